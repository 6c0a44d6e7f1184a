//! Programs as `make install` lays them out.

use std::path::Path;
use std::process::Command;

use grail_tests::binaries::binary;

/// What the dynamic linker would load, one library a line.
fn libraries(program: &Path) -> String {
    let listed = Command::new(program)
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .expect("it runs");
    String::from_utf8(listed.stdout).expect("text")
}

fn libtorch_of(listed: &str) -> &Path {
    let line = listed.lines().find(|line| line.contains("libtorch_cpu.so")).expect("it is linked");
    Path::new(line.split_whitespace().nth(2).expect("a place"))
}

#[test]
fn installed_programs_use_the_libraries_beside_them_and_not_those_of_a_checkout() {
    let folder = tempfile::tempdir().unwrap();
    let (programs, torch) = (folder.path().join("bin"), folder.path().join("lib/grail-supervisor/torch"));
    std::fs::create_dir_all(&programs).unwrap();
    std::fs::create_dir_all(&torch).unwrap();
    let built_with = libraries(&binary("grail-proof-worker"));
    let checkout = libtorch_of(&built_with).parent().unwrap();
    std::os::unix::fs::symlink(checkout, torch.join("lib")).unwrap();
    for name in ["grail-proof-worker", "grail-builtin-server"] {
        let installed = programs.join(name);
        std::fs::hard_link(binary(name), &installed)
            .or_else(|_| std::fs::copy(binary(name), &installed).map(drop))
            .unwrap();
        let listed = libraries(&installed);
        // The linker names what lies beside the program by a path over `bin`.
        assert!(libtorch_of(&listed).starts_with(folder.path()), "{name}: {listed}");
    }
}
