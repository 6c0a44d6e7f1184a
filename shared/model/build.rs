//! Checks the libtorch that the build is given, compiles what calls it in C++, and writes where the finished programs find it.
//!
//! The path goes in as `DT_RPATH` (`--disable-new-dtags`): `DT_RUNPATH` of an executable is not used for the libraries of
//! its libraries, and `libtorch_cpu.so` has some.

use std::path::{Path, PathBuf};

/// The one version that the bindings are generated for.
const TORCH_VERSION: &str = "2.11.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    match libtorch() {
        Ok(root) => {
            println!("cargo:rerun-if-changed={}", root.join("version.py").display());
            compile_shim(&root);
            println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
            println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/grail-supervisor/torch/lib");
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", root.join("lib").display());
        }
        Err(problem) => {
            // `cargo::error` ends the build with this line and nothing else, unlike a panic with its backtrace.
            println!("cargo::error={problem}");
        }
    }
}

/// Operators that the Rust bindings lack. They go through libtorch's dispatcher, so nothing of CUDA is needed here.
fn compile_shim(root: &Path) {
    println!("cargo:rerun-if-changed=csrc/torch_shim.cpp");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        // Warnings of libtorch's headers are not ours.
        .warnings(false)
        .opt_level(1)
        .file("csrc/torch_shim.cpp")
        .compile("grail_torch_shim");
}

fn libtorch() -> Result<PathBuf, String> {
    let remedy = "run `make libtorch`, which fetches it once";
    let root = std::env::var_os("LIBTORCH")
        .map(PathBuf::from)
        .ok_or_else(|| format!("LIBTORCH is not set (.cargo/config.toml names it): {remedy}"))?;
    let library = root.join("lib/libtorch_cpu.so");
    if !library.exists() {
        return Err(format!("no libtorch: {} does not exist: {remedy}", library.display()));
    }
    let path = root.join("version.py");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}: {remedy}", path.display()))?;
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = '"))
        .and_then(|rest| rest.split('\'').next())
        .ok_or_else(|| format!("{} names no __version__: {remedy}", path.display()))?;
    if version.split('+').next() != Some(TORCH_VERSION) {
        return Err(format!("libtorch at {} is {version}, {TORCH_VERSION} is needed: {remedy}", root.display()));
    }
    Ok(root)
}
