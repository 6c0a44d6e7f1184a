//! Interpreters that are killed and stopped from outside: what they had is tried again or has no verdict, and the pool
//! recovers.

use std::time::Duration;

use grail_environments::EvaluatorError;
use grail_environments::pool::{Patience, Pool};
use nix::sys::signal::Signal;

use super::support::{
    LONG, assert_healthy, assert_leaves_nothing, children, classes, config, interpreter, run, signal, start, until,
};

const SIGNALS: [Signal; 3] = [Signal::SIGKILL, Signal::SIGSTOP, Signal::SIGSEGV];

/// A pool that notices soon.
async fn watchful() -> Pool {
    let mut config = config(1, 0);
    config.patience = Patience {
        start: Duration::from_secs(30),
        answer: Duration::from_secs(2),
        between_pings: Duration::from_millis(100),
        ping: Duration::from_secs(5),
    };
    start(config).await
}

/// Waits for another process than `old`, and that it works.
async fn assert_recovers(pool: &Pool, old: i32) {
    until(&mut pool.program_states(), |state| state.is_ready && state.pid.is_some_and(|pid| pid != old)).await;
    assert_healthy(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_at_the_start_delays_it() {
    for sent in SIGNALS {
        let pool = watchful().await;
        let helper = until(&mut pool.program_states(), |state| state.pid.is_some()).await.pid.expect("a process");
        signal(helper, sent).await;
        if sent == Signal::SIGSTOP {
            // A helper that has started the interpreter already is needed no more; one that has not is replaced.
            until(&mut pool.program_states(), |state| state.is_ready).await;
            assert_healthy(&pool).await;
        } else {
            assert_recovers(&pool, helper).await;
        }
        assert_leaves_nothing(pool).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_to_an_idle_interpreter_replaces_it() {
    let pool = watchful().await;
    for sent in SIGNALS {
        let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
        // A helper that is stopped does no harm: the interpreter works on without it.
        let target = if sent == Signal::SIGSTOP { interpreter(helper, pool.layers()).expect("one") } else { helper };
        signal(target, sent).await;
        assert_recovers(&pool, helper).await;
    }
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_in_a_program_costs_no_wrong_verdict() {
    let pool = watchful().await;
    for sent in SIGNALS {
        let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
        let target = interpreter(helper, pool.layers()).expect("one");
        // Another program each time.
        let code = format!("n = '{sent}'\nfor n in range(20_000_000): pass");
        let strike = async {
            tokio::time::timeout(LONG, async {
                while children(target).is_empty() {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .expect("a child that runs the program");
            signal(if sent == Signal::SIGSEGV { helper } else { target }, sent).await;
        };
        let (found, ()) = tokio::join!(run(&pool, &code, &["pass"]), strike);
        match found {
            Ok(verdict) => assert_eq!(classes(&verdict), ["-"], "{sent}"),
            Err(EvaluatorError::Undecidable { detail }) => {
                assert!(detail.contains("too near") || detail.contains("too busy"), "{sent}: {detail}")
            }
            Err(error) => panic!("{sent}: {error}"),
        }
        assert_recovers(&pool, helper).await;
    }
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_killed_from_outside_has_no_verdict() {
    let pool = watchful().await;
    let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
    let target = interpreter(helper, pool.layers()).expect("one");
    let strike = async {
        let child = tokio::time::timeout(LONG, async {
            loop {
                // Its own group shows that it has begun to confine itself.
                if let Some(child) = children(target).first() {
                    return *child;
                }
                tokio::task::yield_now().await;
            }
        });
        signal(child.await.expect("a child"), Signal::SIGKILL).await;
    };
    let (found, ()) = tokio::join!(run(&pool, "while True: pass", &["pass"]), strike);
    match found {
        // Killed before it began, it was tried again.
        Ok(verdict) => assert_eq!(classes(&verdict), ["Timeout"]),
        Err(error) => assert!(matches!(error, EvaluatorError::Undecidable { .. }), "{error}"),
    }
    assert_healthy(&pool).await;
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interpreter_is_replaced_after_its_500_children() {
    let pool = start(config(1, 0)).await;
    let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
    for number in 0..500 {
        let code = format!("n = {number}");
        let verdict = run(&pool, &code, &["pass"]).await.expect("a verdict");
        assert_eq!(classes(&verdict), ["-"]);
    }
    assert_recovers(&pool, helper).await;
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_ends_in_a_program_leaves_nothing() {
    let pool = std::sync::Arc::new(watchful().await);
    let helper = until(&mut pool.program_states(), |state| state.is_ready).await.pid.expect("a process");
    let target = interpreter(helper, pool.layers()).expect("one");
    let running = tokio::spawn({
        let pool = std::sync::Arc::clone(&pool);
        async move { tokio::time::timeout(LONG, run(&pool, "while True: pass", &["pass"])).await }
    });
    while children(target).is_empty() {
        tokio::task::yield_now().await;
    }
    running.abort();
    assert!(running.await.is_err_and(|error| error.is_cancelled()));
    let pool = std::sync::Arc::into_inner(pool).expect("nobody else has it");
    assert_leaves_nothing(pool).await;
}
