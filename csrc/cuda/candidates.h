// Launches that only a GPU can choose between: a process may be told which of a kernel's candidates to take, to time
// them in turn (benchmarks/gpu_run.py, "tuning"). 0 is what runs otherwise. All give the same values, though sums may
// be rounded in another order.
#pragma once

namespace fastllm {

enum class Tuned { kAdamw, kNormFwd, kNormBwd };

int candidate(Tuned kernel);

// AdamW: how many times a block's threads take their eight elements.
constexpr int kAdamwSteps[] = {4, 2, 8, 16, 32};

// The forward of norms: as many bytes a thread as its registers hold; 16 elements where a row has up to 4,096; or a
// grid that stays, whose blocks walk over the rows.
enum NormFwdCandidate { kFewThreads, kManyThreads, kStaying, kNormFwdCandidates };

// The backward of norms: the most threads of a block, which is as many rows as they make. Fewer wait for each other
// less; shared memory holds as many blocks, so that there are fewer rows at once.
constexpr int kNormBwdThreads[] = {512, 256, 128};

}  // namespace fastllm
