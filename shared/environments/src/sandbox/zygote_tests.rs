//! Parts of the interpreter's text, run without a sandbox and without text of a model.

use std::path::Path;
use std::process::Command;

use super::plan::ZYGOTE;
use super::setup::Installation;

/// What the interpreter that `make evaluator` sets up prints when it has all definitions of the zygote's text, does not serve,
/// and runs `program`, with the folder of sympy as its argument.
pub(crate) fn in_interpreter(program: &str) -> String {
    let installation = Installation::of_this_user(|name| std::env::var_os(name)).unwrap();
    let python = std::fs::read_to_string(installation.folder().join("python")).expect("`make evaluator` was run");
    let definitions = ZYGOTE.strip_suffix("\nmain()\n").expect("serving is the last line");
    let output = Command::new(Path::new(python.trim()))
        .args(["-I", "-S", "-E", "-X", "utf8", "-c", &format!("{definitions}\n{program}")])
        .arg(installation.folder().join("site"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The lines that a child would write for `code` and `tests`.
fn records(code: &str, tests: &[&str]) -> Vec<String> {
    let request = serde_json::json!({ "code": code, "tests": tests, "time_s": 5 }).to_string();
    let text =
        in_interpreter(&format!("run_program(json.loads({request:?}), lambda line: print(line.decode(), end=''))"));
    text.lines().map(str::to_owned).collect()
}

/// Whether each test's outcome may be another in another interpreter, as its record says.
fn open_marks(code: &str, tests: &[&str]) -> Vec<bool> {
    let lines = records(code, tests);
    assert_eq!(lines[0], "S valid");
    lines[1..].iter().map(|line| line.split(' ').nth(3).unwrap() != "0").collect()
}

#[test]
fn outcomes_may_hang_on_sets_however_they_are_made() {
    let open = [
        "x = set('ab')",
        "x = {*'ab'}",
        "x = {c for c in 'ab'}",
        "x = [c for c in {'a', 'b'}]",
        "for c in {'a', 'b'}: pass",
        "x = list({1: 2}.keys() & {1: 3}.keys())",
        "def f(d): return [k for k in d.items() - d.items()]",
        "def f():\n    def g(): return frozenset('ab')\n    return g",
        "x = 'a'.__hash__()",
        "from functools import reduce\ndef f(ds): return list(reduce(lambda a, b: a & b, [d.keys() for d in ds]))",
        "def g(a, b): return [k for k in a & b]\ndef f(d, e): return g(d.keys(), e.keys())",
        "def f(a, b):\n    ka = a.keys()\n    kb = b.keys()\n    def g(): return ka & kb\n    return g",
        "import operator\ndef f(x, y): return operator.and_(x.keys(), y.keys())",
        "import operator, functools\ndef f(ds): return functools.reduce(operator.and_, map(dict.keys, ds))",
        "def f(d, e): return d.keys().__or__(e)",
        "x = __builtins__['set']('ab')",
    ];
    assert_eq!(open_marks("", &open), vec![true; open.len()]);
    let settled = [
        "x = 'a' in {'a', 'b'}",
        "x = {'a': 1}",
        "for k in {'a': 1}.keys(): x = k + 'b'",
        "for k, v in {'a': 1}.items(): x = v * 2",
        "x = [1, 2]\ny = sorted(x)",
        "import math\nx = math.pi - 1",
        "def f(d):\n    for k, v in d.items(): x = k\ndef g(n): return n - 1",
        "def f(n): return n & 1",
    ];
    assert_eq!(open_marks("", &settled), vec![false; settled.len()]);
}

#[test]
fn a_test_that_failed_hangs_on_them_as_well() {
    let marks = open_marks("s = set('ab')", &["assert list(s)[0] == 'a'", "assert False", "(", "raise ValueError"]);
    // What does not compile does so nowhere.
    assert_eq!(marks, [true, true, false, true]);
    assert_eq!(open_marks("", &["assert False"]), [false]);
}

#[test]
fn a_program_has_a_line_for_its_syntax_and_one_per_test() {
    assert_eq!(records("(", &["pass"]), ["S invalid"]);
    let minus = format!("x = {}1", "-".repeat(10_000));
    assert_eq!(records(&minus, &["pass"]), ["S compiler_failed"]);
    assert_eq!(records("x = 1", &["assert x == 1", "assert x == 2"]).len(), 3);
}
