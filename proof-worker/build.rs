//! Lets the program find libtorch by itself: beside an installed program, or where it was built.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // DT_RPATH, not DT_RUNPATH: the latter is not used for the libraries of libraries.
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    // First: an installed program must not live off a checkout.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/grail-supervisor/torch/lib");
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let libraries = PathBuf::from(libtorch).join("lib");
        let libraries = std::path::absolute(&libraries).unwrap_or(libraries);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    }
}
