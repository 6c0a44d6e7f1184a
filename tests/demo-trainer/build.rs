//! Lets the program and its tests find libtorch by themselves; `grail-model` checks which libtorch it is.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    match std::env::var_os("LIBTORCH").map(PathBuf::from) {
        Some(root) => {
            // `DT_RPATH`, not `DT_RUNPATH`: the latter is not used for the libraries of libraries.
            println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
            println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/grail-supervisor");
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", root.join("lib").display());
        }
        None => println!("cargo::error=LIBTORCH is not set (.cargo/config.toml names it): run `make libtorch`"),
    }
}
