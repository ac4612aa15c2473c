//! CUDA sources to machine code for one architecture: NVRTC, and a directory where its results are kept.

use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::driver::Source;
use crate::error::KernelError;

/// The headers that sources include: name and text.
const HEADERS: &[(&CStr, &str)] = &[
    (c"common.cuh", include_str!("../../cuda/common.cuh")),
    (c"warpgroup.cuh", include_str!("../../cuda/warpgroup.cuh")),
];

/// What NVRTC is told besides the architecture.
const OPTIONS: [&str; 1] = ["--std=c++17"];

/// A generation of cards, by compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Architecture {
    /// Major and minor compute capability.
    pub compute_capability: (u32, u32),
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        // Hopper's own instructions exist only in the variant with an a.
        let variant = if (major, minor) == (9, 0) { "a" } else { "" };
        write!(f, "sm_{major}{minor}{variant}")
    }
}

impl FromStr for Architecture {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an architecture, expected one such as sm_80 or sm_90");
        let digits = text.strip_prefix("sm_").ok_or_else(wrong)?;
        let number: u32 = digits.strip_suffix('a').unwrap_or(digits).parse().map_err(|_| wrong())?;
        if number < 80 {
            return Err(format!("{text} is not supported: the kernels need sm_80 or later"));
        }
        Ok(Self { compute_capability: (number / 10, number % 10) })
    }
}

/// Compiles sources, or finds them compiled.
#[derive(Clone, Debug)]
pub struct Compiler {
    directory: Option<PathBuf>,
}

impl Compiler {
    /// A compiler that keeps its results in `directory`, if given one, and takes what it finds there: NVRTC is needed
    /// for the rest only.
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// The machine code of `source` for `architecture`, a cubin.
    ///
    /// # Errors
    /// When it is not in the directory and NVRTC is not found or refuses it.
    pub fn cubin(&self, source: Source, architecture: Architecture) -> Result<Vec<u8>, KernelError> {
        let options = options(architecture);
        let name = [source.name, source.variant].join(if source.variant.is_empty() { "" } else { "-" });
        let stem = format!("{name}-{architecture}-{}", digest(source, &options));
        if let Some(path) = self.directory.as_deref().and_then(|directory| find(directory, &stem)) {
            match std::fs::read(&path) {
                Ok(cubin) => return Ok(cubin),
                Err(error) => tracing::warn!("cannot read {}: {error}; compiling again", path.display()),
            }
        }
        let failed = |reason: String| KernelError::Device {
            device: "NVRTC".to_owned(),
            action: format!("compile {} for {architecture}", source.name),
            reason,
        };
        let version = version().map_err(failed)?;
        let cubin = compile(source, &options).map_err(failed)?;
        if let Some(directory) = &self.directory {
            let path = directory.join(format!("{stem}-nvrtc{version}.cubin"));
            if let Err(error) = store(directory, &path, &cubin) {
                tracing::warn!(
                    "cannot keep a kernel in {}: {error}; it will be compiled again",
                    path.display()
                );
            }
        }
        Ok(cubin)
    }
}

/// The version of the NVRTC that is found on this machine, or why none is.
pub fn version() -> Result<String, String> {
    // SAFETY: opening a library runs its initializers, which for NVRTC have no conditions.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no libnvrtc.so on this machine; install the CUDA toolkit's NVRTC (such as the Python \
                    package nvidia-cuda-nvrtc) and put its directory in LD_LIBRARY_PATH, or give a directory with \
                    kernels that `nibble kernels compile` made"
            .to_owned());
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to live integers.
    check(unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) })?;
    Ok(format!("{major}.{minor}"))
}

fn options(architecture: Architecture) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(str::to_owned));
    options
}

/// A name for everything the machine code depends on but the compiler's version.
fn digest(source: Source, options: &[String]) -> String {
    let mut hash = Sha256::new();
    let headers = HEADERS.iter().map(|(_, text)| *text);
    for part in headers.chain([source.text]).chain(options.iter().map(String::as_str)) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The last file in `directory` whose name begins with `stem`: that of the newest compiler.
fn find(directory: &Path, stem: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?;
    let is_cubin = |name: &str| name.starts_with(stem) && name.ends_with(".cubin");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| is_cubin(name)).max().map(|name| directory.join(name))
}

/// Writes a file that is either whole or not there, also when several programs start at once.
fn store(directory: &Path, path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let part = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&part, cubin)?;
    std::fs::rename(&part, path)
}

fn check(result: sys::nvrtcResult) -> Result<(), String> {
    result.result().map_err(|error| format!("{error}"))
}

/// An NVRTC program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is destroyed here only. A failure leaks it, no more.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn compile(source: Source, options: &[String]) -> Result<Vec<u8>, String> {
    let text = c_string(source.text)?;
    let name = c_string(&format!("{}.cu", source.name))?;
    let header_texts = HEADERS.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>, _>>()?;
    let headers: Vec<*const c_char> = header_texts.iter().map(|header| header.as_ptr()).collect();
    let header_names: Vec<*const c_char> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
    let option_texts = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
    let options: Vec<*const c_char> = option_texts.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: every pointer is to a string that ends with zero and lives to the end of this function; there are as many
    // headers and names as it is told.
    check(unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            headers.as_ptr(),
            header_names.as_ptr(),
        )
    })?;
    // SAFETY: the program was created; `options` holds as many strings as it says.
    let compiled =
        check(unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) });
    compiled.map_err(|error| format!("{error}:\n{}", log(&program)))?;
    let mut bytes = 0;
    // SAFETY: the program was compiled; the pointer is to a live integer.
    check(unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut bytes) })?;
    let mut cubin = vec![0_u8; bytes];
    // SAFETY: the program was compiled, and `cubin` has the size that it was said to have.
    check(unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) })?;
    Ok(cubin)
}

/// What the compiler had to say.
fn log(program: &Program) -> String {
    let mut bytes = 0;
    // SAFETY: the program exists; the pointer is to a live integer.
    if check(unsafe { sys::nvrtcGetProgramLogSize(program.0, &raw mut bytes) }).is_err() {
        return String::new();
    }
    let mut log = vec![0_u8; bytes];
    // SAFETY: the program exists, and `log` has the size that it was said to have.
    if check(unsafe { sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()) }).is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_owned()
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| "the text contains a zero byte".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source { name: "nothing", variant: "", text: "#include \"common.cuh\"\n" };

    #[test]
    fn an_architecture_is_read_and_written_as_the_compiler_names_it() {
        for (text, name) in
            [("sm_80", "sm_80"), ("sm_90", "sm_90a"), ("sm_90a", "sm_90a"), ("sm_120", "sm_120")]
        {
            assert_eq!(text.parse::<Architecture>().unwrap().to_string(), name);
        }
        for wrong in ["80", "sm_", "sm_75", "compute_80", "sm_8x"] {
            assert!(wrong.parse::<Architecture>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_kernel_that_was_compiled_before_needs_no_compiler() {
        let directory = tempfile::tempdir().unwrap();
        let architecture: Architecture = "sm_80".parse().unwrap();
        let compiler = Compiler::new(Some(directory.path().to_owned()));
        let stem = format!("nothing-sm_80-{}", digest(SOURCE, &options(architecture)));
        for (version, content) in [("13.1", "older"), ("13.2", "newer")] {
            std::fs::write(directory.path().join(format!("{stem}-nvrtc{version}.cubin")), content).unwrap();
        }
        assert_eq!(compiler.cubin(SOURCE, architecture).unwrap(), b"newer");
    }

    #[test]
    fn another_text_header_or_option_has_another_name() {
        let other = Source { text: "#include \"common.cuh\"\n\n", ..SOURCE };
        let options = options("sm_80".parse().unwrap());
        assert_ne!(digest(SOURCE, &options), digest(other, &options));
        assert_ne!(digest(SOURCE, &options), digest(SOURCE, &options[1..]));
    }
}
