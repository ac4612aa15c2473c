//! From a kernel's source to a shared object, kept in a cache beside the test's binary.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, io};

/// The sources a kernel is compiled with, by name. All of them decide whether a cached object is still right.
const HEADERS: [(&str, &str); 4] = [
    ("common.cuh", include_str!("../../src/cuda/common.cuh")),
    ("warpgroup.cuh", include_str!("../../src/cuda/warpgroup.cuh")),
    ("cuda_emulator.h", include_str!("../cuda_emulator.h")),
    ("warpgroup_emulator.h", include_str!("../warpgroup_emulator.h")),
];
const RUNTIME: [(&str, &str); 11] = [
    ("async_copy.h", include_str!("../runtime/async_copy.h")),
    ("collectives.h", include_str!("../runtime/collectives.h")),
    ("conflicts.h", include_str!("../runtime/conflicts.h")),
    ("fiber.h", include_str!("../runtime/fiber.h")),
    ("global_shadow.h", include_str!("../runtime/global_shadow.h")),
    ("interface.h", include_str!("../runtime/interface.h")),
    ("machine.h", include_str!("../runtime/machine.h")),
    ("memory.h", include_str!("../runtime/memory.h")),
    ("shadow.h", include_str!("../runtime/shadow.h")),
    ("warpgroup.h", include_str!("../runtime/warpgroup.h")),
    ("warpgroup_state.h", include_str!("../runtime/warpgroup_state.h")),
];
const RUNTIME_SOURCE: (&str, &str) = ("runtime.cpp", include_str!("../runtime/runtime.cpp"));

const FLAGS: [&str; 5] =
    ["-std=c++20", "-march=x86-64-v3", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"];
/// Most of the time goes to the runtime; kernels compile twice as fast this way.
const KERNEL_OPTIMIZATION: &str = "-O1";
const RUNTIME_OPTIMIZATION: &str = "-O2";
/// Reports each load and store to the runtime; the second part leaves out calls at every function's begin and end.
const REPORT_ACCESSES: [&str; 3] = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"];

/// Compiles a kernel source, unless it is in the cache, and gives the path of the shared object. `warpgroups` says that
/// the device has Hopper's products of warpgroups.
pub(crate) fn compile(name: &str, text: &str, warpgroups: bool) -> Result<PathBuf, String> {
    let key = hash(&(
        FLAGS,
        KERNEL_OPTIMIZATION,
        REPORT_ACCESSES,
        HEADERS,
        RUNTIME,
        RUNTIME_SOURCE,
        name,
        text,
        warpgroups,
    ));
    let cache = cache_folder()?;
    let object = cache.join(format!("{name}-{key:016x}.so"));
    if object.exists() {
        return Ok(object);
    }
    let runtime = compile_runtime(&cache)?;
    let folder = Scratch::new(&cache)?;
    folder.write(&HEADERS)?;
    folder.write(&[("kernel.cu", text)])?;
    let mut command = compiler();
    command.args(FLAGS).arg(KERNEL_OPTIMIZATION).args(REPORT_ACCESSES).arg("-DNIBBLE_EMULATOR");
    if warpgroups {
        command.arg("-DNIBBLE_EMULATE_WARPGROUPS");
    }
    command.args(["-c", "-x", "c++", "kernel.cu", "-o", "kernel.o"]);
    folder.run(command)?;
    // Without -fsanitize: its calls find the runtime's functions, not a library of the compiler's.
    let mut command = compiler();
    command.args(["-shared", "-Wl,-Bsymbolic", "kernel.o"]).arg(runtime).args(["-o", "kernel.so"]);
    folder.run(command)?;
    folder.publish("kernel.so", &object)?;
    Ok(object)
}

fn compile_runtime(cache: &Path) -> Result<PathBuf, String> {
    let key = hash(&(FLAGS, RUNTIME_OPTIMIZATION, RUNTIME, RUNTIME_SOURCE));
    let object = cache.join(format!("runtime-{key:016x}.o"));
    if !object.exists() {
        let folder = Scratch::new(cache)?;
        folder.write(&RUNTIME)?;
        folder.write(&[RUNTIME_SOURCE])?;
        let mut command = compiler();
        command.args(FLAGS).arg(RUNTIME_OPTIMIZATION).args(["-c", "runtime.cpp", "-o", "runtime.o"]);
        folder.run(command)?;
        folder.publish("runtime.o", &object)?;
    }
    Ok(object)
}

fn compiler() -> Command {
    Command::new("c++")
}

fn cache_folder() -> Result<PathBuf, String> {
    let binary = env::current_exe().map_err(|error| format!("the running program has no path: {error}"))?;
    let folder = binary.parent().unwrap_or(Path::new(".")).join("emulated-kernels");
    fs::create_dir_all(&folder).map_err(describe(&folder))?;
    Ok(folder)
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn describe(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// A folder to compile in, removed at the end. Processes that compile the same at once each have their own.
struct Scratch(PathBuf);

impl Scratch {
    fn new(cache: &Path) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = cache.join(format!("compiling-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).map_err(describe(&path))?;
        Ok(Self(path))
    }

    fn write(&self, files: &[(&str, &str)]) -> Result<(), String> {
        for (name, text) in files {
            let path = self.0.join(name);
            fs::write(&path, text).map_err(describe(&path))?;
        }
        Ok(())
    }

    fn run(&self, mut command: Command) -> Result<(), String> {
        let program = command.get_program().to_owned();
        let output = command.current_dir(&self.0).output().map_err(|error| missing(&program, &error))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    fn publish(&self, name: &str, to: &Path) -> Result<(), String> {
        fs::rename(self.0.join(name), to).map_err(describe(to))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind is only in the way of nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn missing(program: &OsStr, error: &io::Error) -> String {
    format!(
        "{}: {error}; the emulator needs g++ 12 or later, as c++ in PATH (Debian: apt-get install g++)",
        program.display()
    )
}
