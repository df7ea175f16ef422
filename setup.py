"""Builds fastllm's compiled kernels: `fastllm._C` (CPU) and, where nvcc is found, `fastllm/_C_cuda.so`.

Environment:
  CXX, CUDA_HOME         the compilers (default: c++ or g++ on PATH; nvcc on PATH or /usr/local/cuda)
  FASTLLM_CUDA=0         skip the CUDA kernels
  FASTLLM_CUDA_ARCHS     what to compile them for (default "80;90;100;120"; "native": the GPUs of this machine)
  MAX_JOBS               how many compilers run at once (default: ninja's choice)
"""

from __future__ import annotations

import os
import platform
import re
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


def cuda_archs() -> list[str]:
    archs = os.environ.get("FASTLLM_CUDA_ARCHS") or CUDA_ARCHS
    if archs != "native":
        return archs.replace(",", ";").split(";")
    import torch

    found = {"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    if not found:
        raise SystemExit("FASTLLM_CUDA_ARCHS=native, but torch sees no GPU on this machine.")
    return sorted(found, key=int)


def gencode(archs: list[str]) -> list[str]:
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
        def get_ext_filename(self, name):
            if name.endswith("_C_cuda"):  # loaded by path, not imported: no Python version in its name
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def build_extension(self, ext):
            if ext.name.endswith("_C_cuda"):
                return self.build_cuda(ext)
            ext.include_dirs = [*include_paths(), pybind11.get_include()]
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
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *DEFINES]
            flags += ["-lineinfo", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
            flags += ["-diag-suppress", "20012,20013,20014,20015", "-ccbin", find_compiler()]
            flags += gencode(cuda_archs())
            flags += [f"-I{path}" for path in include_paths()]
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            objects = {str(build / Path(source).with_suffix(".o").name): ROOT / source for source in CUDA_SOURCES}
            lines = [
                f"nvcc = {find_nvcc()}",
                f"flags = {' '.join(flags)}",
                f"link = -shared -cudart static -ccbin {find_compiler()} -L{torch_lib} -L{build} "
                "-Xlinker --no-as-needed -ltorch_cpu -ltorch_cuda",
                "rule compile",
                "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
                "  description = nvcc $in",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                "  command = $nvcc $in $link -o $out",
                "  description = link $out",
                *(f"build {out}: compile {source}" for out, source in objects.items()),
                f"build {target}: link {' '.join(objects)}",
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
    package_data={"fastllm": ["py.typed"], "fastllm.benchmarks": ["results/*.json"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_ext": make_build_ext()} if extensions else {},
    zip_safe=False,
)
