"""Word vectors of a text file, or of Python's own help pages; with --gensim, beside gensim's, in alternation."""

import argparse
import re
import statistics
import time

import torch

from fastllm.data import read_text, topics_text
from fastllm.models.word2vec import Word2VecConfig, WordVectors, train_word2vec

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", nargs="?", help="UTF-8 text; a line is a sentence")
parser.add_argument("--column", type=int, help="of tab-separated lines, from 0; negative ones count from the end")
parser.add_argument("--architecture", choices=("skip_gram", "cbow"), default="skip_gram")
parser.add_argument("--dim", type=int, default=100)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--words", nargs="*", help="whose neighbours to show; default: a few frequent ones")
parser.add_argument("--save", metavar="PATH", help="write the vectors in word2vec's text format")
parser.add_argument("--gensim", action="store_true", help='needs pip install "fastllm-kernels[gensim]"')
parser.add_argument("--rounds", type=int, default=7, help="of the comparison with gensim")
arguments = parser.parse_args()

torch.set_num_threads(arguments.threads)
try:
    text = read_text(arguments.file) if arguments.file else topics_text()
except (OSError, ValueError) as error:
    parser.error(str(error))
lines = text.lower().splitlines()
if arguments.column is not None:
    lines = [line.split("\t")[arguments.column] for line in lines]
sentences = [words for line in lines if (words := re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", line))]
config = Word2VecConfig(architecture=arguments.architecture, dim=arguments.dim, epochs=arguments.epochs)


def show(wv: WordVectors) -> None:
    for word in arguments.words or wv.words[50:400:70]:
        neighbours = ", ".join(f"{other} {cosine:.2f}" for other, cosine in wv.nearest(word, 6))
        print(f"{word}: {neighbours}")


wv = train_word2vec(sentences, config, lambda epoch, loss: print(f"epoch {epoch} loss {loss:.4f}"))
show(wv)
if arguments.save:
    wv.save(arguments.save)

if arguments.gensim:
    from gensim.models import Word2Vec

    def gensim_vectors() -> WordVectors:
        model = Word2Vec(
            sentences,
            sg=config.architecture == "skip_gram",
            vector_size=config.dim,
            window=config.window,
            negative=config.negatives,
            min_count=config.min_count,
            sample=config.sample,
            epochs=config.epochs,
            workers=arguments.threads,
        )
        return WordVectors(model.wv.index_to_key, torch.from_numpy(model.wv.vectors))

    seconds: dict[str, list[float]] = {"fastllm": [], "gensim": []}
    for _ in range(arguments.rounds):
        for name, train in (("fastllm", lambda: train_word2vec(sentences, config)), ("gensim", gensim_vectors)):
            started = time.perf_counter()
            wv = train()
            seconds[name].append(time.perf_counter() - started)
    print("gensim's neighbours")
    show(wv)
    # Reading the sentences and all epochs: what a call takes.
    words = config.epochs * sum(map(len, sentences))
    for name, taken in seconds.items():
        print(f"{name}: {words / statistics.median(taken):,.0f} words/s with {arguments.threads} threads")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"fastllm / gensim: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
