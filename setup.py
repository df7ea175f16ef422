"""Builds fastllm's compiled kernels: `fastllm._C` (CPU) and, where nvcc is found, `fastllm/_C_cuda.so`.

Environment:
  CXX, CUDA_HOME         the compilers (default: c++ or g++ on PATH; nvcc on PATH or /usr/local/cuda)
  FASTLLM_CUDA=0         skip the CUDA kernels
  FASTLLM_CUDA_ARCHS     what to compile them for (default "80;90;100;120"; "native": the GPUs of this machine); what
                         nvcc does not know is left out
  MAX_JOBS               how many compilers run at once (default: ninja's choice)
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CUDA_ARCHS = "80;90;100;120"

# What csrc/cpu/isa is compiled for, one pass each; csrc/cpu/capability.cpp chooses at run time. adamw.cpp must round as
# it is written (csrc/math/adamw.h).
EXACT = ["-ffp-contract=off"]
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


def find_compiler() -> str | None:
    return next((path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    if os.environ.get("FASTLLM_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        shutil.which("nvcc", path=f"{home}/bin")
        if home
        else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    )


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# Not in the Extension: torch's BuildExtension would see CUDA files there and ask for a CUDA of its own choice.
CUDA_SOURCES = sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")


def source_digest() -> str:
    """SHA-256 of csrc/. The CUDA library holds it, so that a run on another machine can tell whether it is of its
    sources."""
    digest = hashlib.sha256()
    for name in sources("csrc/**/*"):
        if (ROOT / name).is_file():
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def object_names(names: list[str | Path]) -> dict[str | Path, str]:
    """The object file of each source: by its whole name, so that those of adamw.cu and adamw.cpp are two."""
    objects = {name: Path(name).name + ".o" for name in names}
    if shared := [str(name) for name in names if [*objects.values()].count(objects[name]) > 1]:
        raise SystemExit(f"fastllm: {', '.join(shared)} would be compiled into one object file; rename all but one.")
    return objects


def ninja_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


@functools.cache
def cuda_archs() -> tuple[str, ...]:
    """What the CUDA kernels are compiled for, the newest last; empty where nvcc knows none of the default ones."""
    given = os.environ.get("FASTLLM_CUDA_ARCHS")
    wanted = re.split("[;, ]+", given or CUDA_ARCHS)
    if given == "native":
        import torch

        wanted = ["{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
        if not wanted:
            raise SystemExit("FASTLLM_CUDA_ARCHS=native, but torch sees no GPU on this machine.")
    listed = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    unknown = [arch for arch in wanted if arch.rstrip("af") not in known]
    if unknown:
        print(f"fastllm: {find_nvcc()} does not know sm_{', sm_'.join(unknown)}: no CUDA kernels for them.")
    if given and len(unknown) == len(wanted):
        raise SystemExit(f"FASTLLM_CUDA_ARCHS={given!r}: nvcc knows none of them; it knows {', '.join(sorted(known))}.")
    return tuple(sorted({*wanted} - {*unknown}, key=lambda arch: (int(arch.rstrip("af")), arch)))


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX of the newest for chips to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def build_facts(torch_version: str) -> list[str]:
    """What `fastllm info` reports, as macros of csrc/module.cpp."""
    facts = {"TORCH": torch_version, "CUDA_COMPILER": "", "CUDA_ARCHS": ""}
    if find_nvcc():
        output = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
        facts["CUDA_COMPILER"] = "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", output).group(1)
        facts["CUDA_ARCHS"] = ";".join(cuda_archs())
    return [f'-DFASTLLM_BUILT_{name}="{value}"' for name, value in facts.items()]


def make_build_ext():
    """The build_ext command; without torch, one that stops with the command that would have worked."""
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths
    except ImportError as error:
        from setuptools.command.build_ext import build_ext

        missing = error.name

        class Stop(build_ext):
            def run(self):
                raise SystemExit(
                    f"fastllm: building the kernels needs {missing}, which this build environment does not have: "
                    "run `pip install torch setuptools ninja pybind11` and then "
                    "`pip install --no-build-isolation .` instead."
                )

        return Stop

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"fastllm needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, found {torch.__version__}.")
    torch_lib = Path(torch.__file__).parent / "lib"

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.parallel is None and "MAX_JOBS" not in os.environ:
                self.parallel = True  # both libraries at once: each has compilations that wait for nothing
            if find_nvcc() and not cuda_archs():
                self.extensions = [ext for ext in self.extensions if not ext.name.endswith("_C_cuda")]

        def get_ext_filename(self, name):
            if name.endswith("_C_cuda"):  # loaded by path, not imported: no Python version in its name
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def build_extension(self, ext):
            if ext.name.endswith("_C_cuda"):
                return self.build_cuda(ext)
            # pybind11 first: torch 2.11 has one of its own, which refuses TORCH_TARGET_VERSION.
            ext.include_dirs = [pybind11.get_include(), *include_paths()]
            ext.library_dirs = [str(torch_lib)]
            flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno"]
            flags += ["-Wall", "-Wno-maybe-uninitialized", *DEFINES]
            ext.extra_compile_args = [*flags, *build_facts(torch.__version__)]
            ext.extra_objects = [
                object_file
                for isa, isa_flags in ISAS.items()
                for source in sources("csrc/cpu/isa/*.cpp")
                for object_file in self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp) / isa),
                    depends=sources("csrc/**/*.h"),
                    extra_postargs=[
                        *flags,
                        *isa_flags,
                        *(EXACT if source.endswith("adamw.cpp") else []),
                        "-Wno-psabi",
                        f"-DFASTLLM_ISA={isa}",
                    ],
                )
            ]
            return super().build_extension(ext)

        def build_cuda(self, ext):
            """Runs nvcc through ninja: torch's own CUDA rules want a torch built with CUDA, which this does not.

            Kernels (*.cu) know no torch; nvcc hands the *.cpp beside them to the C++ compiler.
            """
            build = Path(self.build_temp).resolve() / "cuda"
            build.mkdir(parents=True, exist_ok=True)
            if not (torch_lib / "libtorch_cuda.so").exists():
                # A CPU-only torch: link against an empty library of that name, so that the real one is found at run
                # time.
                link = [find_compiler(), "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so"]
                subprocess.run([*link, "-o", build / "libtorch_cuda.so"], check=True)
            digest = build / "sources.cpp"
            text = f'extern "C" {{\nextern const char fastllm_sources[] = "fastllm-sources:{source_digest()}";\n}}\n'
            if not digest.exists() or digest.read_text() != text:
                digest.write_text(text)
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *DEFINES]
            flags += ["-lineinfo", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
            flags += ["-diag-suppress", "20012,20013,20014,20015", "-ccbin", find_compiler()]
            flags += [*gencode(cuda_archs()), *(f"-I{path}" for path in include_paths())]
            link = ["-shared", "-cudart", "static", "-ccbin", find_compiler(), f"-L{torch_lib}", f"-L{build}"]
            link += ["-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            objects = {build / name: ROOT / source for source, name in object_names([*CUDA_SOURCES, digest]).items()}
            lines = [
                f"nvcc = {ninja_command(find_nvcc())}",
                f"flags = {ninja_command(*flags)}",
                f"link = {ninja_command(*link)}",
                "rule compile",
                "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
                "  description = nvcc $in",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                "  command = $nvcc $in $link -o $out",
                "  description = link $out",
                *(f"build {ninja_path(out)}: compile {ninja_path(source)}" for out, source in objects.items()),
                f"build {ninja_path(target)}: link {' '.join(map(ninja_path, objects))}",
            ]
            (build / "build.ninja").write_text("\n".join(lines) + "\n")
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            subprocess.run(["ninja", "-C", str(build), *jobs], check=True)

    return Build.with_options(use_ninja=True)


extensions = []
if find_compiler() is None:
    print("fastllm: no C++ compiler found: installing without kernels; every op will run on its reference.")
else:
    os.environ.setdefault("CXX", find_compiler())
    extensions.append(
        Extension("fastllm._C", sources("csrc/*.cpp", "csrc/cpu/*.cpp"), libraries=["torch_cpu"], language="c++")
    )
    if find_nvcc() is not None:
        extensions.append(Extension("fastllm._C_cuda", [], language="c++"))

setup(
    packages=sorted({*find_packages(include=["fastllm", "fastllm.*"]), "fastllm.kernels", "fastllm.benchmarks"}),
    package_dir={"fastllm.kernels": "kernels", "fastllm.benchmarks": "benchmarks"},
    package_data={"fastllm": ["py.typed", "data/stop_words/*.txt"], "fastllm.benchmarks": ["results/*.json"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_ext": make_build_ext()} if extensions else {},
    zip_safe=False,
)
