//! Lets the binaries find libtorch by themselves: beside an installed program, or in the folder that they were built with.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    // First: an installed program must not live off a checkout.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/grail-supervisor/torch/lib");
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let libraries = PathBuf::from(libtorch).join("lib");
        // Through the link to the fetched files, so that the path stays short and the fetch may move them.
        let libraries = std::path::absolute(&libraries).unwrap_or(libraries);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    }
}
