//! Positive controls: without the layers that hold it, each attack reaches its goal, against what is planted and inside of
//! throwaway namespaces where those are not what holds it.

use grail_environments::sandbox::Layer;
use grail_environments::{Evaluator, EvaluatorError};

use super::attacks::{ESCAPE, Planted, SECRET, guarded};
use super::support::{
    assert_healthy, assert_leaves_nothing, classes, interpreter, namespace_members, run, session_members, until,
    weakened,
};

#[tokio::test(flavor = "multi_thread")]
async fn without_their_layers_attacks_reach_their_goals() {
    let planted = Planted::new();
    let attacks = guarded(&planted);
    drop(planted);
    let names: Vec<&str> =
        attacks.iter().filter(|attack| !attack.guards.is_empty()).map(|attack| attack.name).collect();
    let mut reached = Vec::new();
    for name in names.iter().filter(|name| **name != "killing the parent") {
        let mut planted = Planted::new();
        let attack = guarded(&planted).into_iter().find(|attack| attack.name == *name).expect("the same list");
        if attack.name == "tracing a process" && is_tracing_forbidden() {
            println!("skipped: tracing a process: this host forbids it to everybody (Yama)");
            continue;
        }
        let Some(pool) = weakened(attack.guards).await else { continue };
        let found = run(&pool, &attack.code, &["pass"]).await;
        assert_eq!(found.as_ref().map(classes), Ok(vec!["-"]), "{}", attack.name);
        assert_goal(attack.name, &mut planted);
        let state = until(&mut pool.program_states(), |state| state.is_ready).await;
        if let Some(interpreter) = interpreter(state.pid.expect("a process"), pool.layers())
            && pool.layers().has(Layer::Namespaces)
        {
            assert_eq!(namespace_members(interpreter), [interpreter], "{}: nothing is left all the same", attack.name);
        }
        assert_healthy(&pool).await;
        assert_leaves_nothing(pool).await;
        reached.push(attack.name);
    }
    println!("reached their goals: {reached:?}");
}

/// What is to be seen outside of a goal that was reached.
fn assert_goal(name: &str, planted: &mut Planted) {
    match name {
        "writing outside of its folder" => assert!(planted.folder.path().join("written").exists()),
        "connecting to a port" => assert!(planted.tcp.accept().is_ok()),
        "connecting to a Unix socket" => assert!(planted.unix.accept().is_ok()),
        "killing a sibling" => assert!(planted.process.wait().is_ok_and(|status| status.code().is_none())),
        _ => {}
    }
}

fn is_tracing_forbidden() -> bool {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    !matches!(scope.trim(), "" | "0") && !nix::unistd::geteuid().is_root()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interpreter_can_only_be_killed_from_inside_without_two_layers() {
    let kill = format!("{ESCAPE}os.kill(os.getppid(), 9)\n");
    // As the first process of its namespace it does not even hear it.
    if let Some(pool) = weakened(&[Layer::Seccomp]).await {
        let before = until(&mut pool.program_states(), |state| state.is_ready).await;
        assert_eq!(classes(&run(&pool, &kill, &["pass"]).await.unwrap()), ["-"]);
        assert_eq!(until(&mut pool.program_states(), |state| state.is_ready).await, before);
        assert_leaves_nothing(pool).await;
    }
    let Some(pool) = weakened(&[Layer::Seccomp, Layer::Namespaces]).await else { return };
    let found = run(&pool, &kill, &["pass"]).await;
    assert!(matches!(found, Err(EvaluatorError::Sandbox { attempts: 3, .. })), "{found:?}");
    assert_healthy(&pool).await;
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_value_is_what_a_forged_record_lacks() {
    let Some(pool) = weakened(&[]).await else { return };
    // Whoever reads the value from the interpreter's frames passes for himself; a validator, who runs the text, is not fooled.
    let forged = format!(
        "{ESCAPE}f = sys._getframe()\nwhile 'answer' not in f.f_locals: f = f.f_back\n\
         os.write(f.f_locals['record'], b'T 0 1 0 -\\n')\nos._exit(f.f_locals['answer'])\n"
    );
    assert_eq!(classes(&run(&pool, &forged, &["assert False"]).await.unwrap()), ["-"]);
    assert_healthy(&pool).await;
    assert_leaves_nothing(pool).await;
}

#[test]
fn an_environment_that_is_not_emptied_gives_its_secrets_away() {
    let folder = std::env::var("HOME").expect("a home");
    let installation =
        grail_environments::sandbox::setup::Installation::of_this_user(|name| std::env::var_os(name)).expect(&folder);
    let python = std::fs::read_to_string(installation.folder().join("python")).expect("`make evaluator` was run");
    let code = format!("{ESCAPE}print(os.environ.get('PLANTED'))");
    let output =
        std::process::Command::new(python.trim()).args(["-I", "-c", &code]).env("PLANTED", SECRET).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), SECRET);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_enough_layers_is_refused_unless_that_is_accepted() {
    let mut config = super::support::config(1, 0);
    config.layers = config.layers.without(Layer::Seccomp);
    let error = grail_environments::pool::Pool::start(config).await.unwrap_err().to_string();
    assert!(error.contains("lacks seccomp") && error.contains("GRAIL_UNSAFE_SANDBOX"), "{error}");
    let Some(pool) = weakened(&[Layer::Seccomp, Layer::Limits]).await else { return };
    assert!(!pool.layers().has(Layer::Seccomp));
    assert_healthy(&pool).await;
    let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
    assert!(!session_members(helper).is_empty());
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_answers_what_it_has_no_interpreters_for() {
    let programs = super::support::start(super::support::config(1, 0)).await;
    let formulas = super::support::start(super::support::config(0, 1)).await;
    let of = |found: EvaluatorError| match found {
        EvaluatorError::Sandbox { detail, .. } => detail,
        other => panic!("{other}"),
    };
    let ask = tokio::time::timeout(super::support::LONG, programs.are_equal("x", "y"));
    let reason = of(ask.await.expect("an answer").unwrap_err());
    assert_eq!(reason, "this pool was started without interpreters for formulas");
    let reason = of(run(&formulas, "x = 1", &["pass"]).await.unwrap_err());
    assert_eq!(reason, "this pool was started without interpreters for programs");
    assert_leaves_nothing(programs).await;
    assert_leaves_nothing(formulas).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interpreters_give_way_within_their_session_and_as_a_session() {
    let mut config = super::support::config(1, 0);
    config.nice = 7;
    let pool = super::support::start(config).await;
    let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
    let interpreter = interpreter(helper, pool.layers()).expect("an interpreter");
    let own = std::fs::read_to_string("/proc/self/stat").expect("a process");
    let nice = |stat: &str| -> i32 {
        let (_, rest) = stat.rsplit_once(')').expect("a name");
        rest.split_ascii_whitespace().nth(16).expect("a field").parse().expect("a number")
    };
    let found = std::fs::read_to_string(format!("/proc/{interpreter}/stat")).expect("a process");
    assert_eq!(nice(&found), (nice(&own) + 7).min(19));
    match std::fs::read_to_string(format!("/proc/{helper}/autogroup")) {
        Ok(group) => assert!(group.trim_end().ends_with("nice 7"), "{group}"),
        Err(error) => println!("skipped: this kernel does not group processes by session: {error}"),
    }
    assert_leaves_nothing(pool).await;
}
