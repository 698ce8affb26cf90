//! Which threads work on which job, and that every task runs once.

use super::*;
use std::collections::HashSet;
use std::time::{Duration, Instant};

#[test]
fn every_task_runs_once_whatever_the_threads() {
    let (most, times) = if cfg!(miri) { (30, 4) } else { (1000, 50) };
    for threads in [1, 2, 5] {
        let team = Team::new(threads);
        for tasks in [0, 1, 2, 7, most] {
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            for _ in 0..times {
                team.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == times), "{tasks} tasks on {threads} threads");
        }
    }
}

#[test]
fn sleeping_threads_wake_and_idle_ones_do_not_hold_up() {
    let team = Team::new(3);
    for active in [3, 1, 2, 3] {
        team.set_active(active);
        std::thread::sleep(Duration::from_millis(5));
        let sum = AtomicUsize::new(0);
        team.run(100, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }
}

/// Threads that a job gets: each of its tasks, one for each active thread, waits for the others.
fn threads_at_work(team: &Team) -> usize {
    let seen = Mutex::new(HashSet::new());
    let all_came = || lock(&seen).len() == team.active();
    team.run(team.active(), &|_| {
        lock(&seen).insert(std::thread::current().id());
        let start = Instant::now();
        // A thread that came does not take a second task as long as it waits here for the others.
        while !all_came() && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
    });
    seen.into_inner().unwrap().len()
}

/// How long a test waits for a thread that should come, before it fails.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_second_caller_waits_and_then_has_all_threads() {
    let team = Team::new(2);
    let (first_has_it, second_comes, first_is_done) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let wait_for = |flag: &AtomicBool| {
        while !flag.load(Ordering::SeqCst) {
            std::thread::yield_now()
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| {
            team.run(2, &|_| {
                first_has_it.store(true, Ordering::SeqCst);
                wait_for(&second_comes);
                for _ in 0..20 {
                    std::thread::yield_now();
                }
                first_is_done.store(true, Ordering::SeqCst);
            });
        });
        wait_for(&first_has_it);
        second_comes.store(true, Ordering::SeqCst);
        team.run(2, &|_| assert!(first_is_done.load(Ordering::SeqCst), "two jobs at a time"));
        assert_eq!(threads_at_work(&team), 2);
    });
}

#[test]
fn callers_at_the_same_time_have_all_threads() {
    let team = Team::new(2);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| (0..if cfg!(miri) { 2 } else { 50 }).for_each(|_| assert_eq!(threads_at_work(&team), 2)));
        }
    });
}

#[test]
fn nested_and_concurrent_jobs_finish() {
    // Of the same team, and of two teams whose tasks call each other.
    let (team, other) = (Team::new(2), Team::new(2));
    let (sum, times) = (AtomicUsize::new(0), if cfg!(miri) { 4 } else { 200 });
    let add = |_| {
        sum.fetch_add(1, Ordering::Relaxed);
    };
    std::thread::scope(|s| {
        for (a, b) in [(&team, &team), (&team, &other), (&other, &team)] {
            s.spawn(move || (0..times).for_each(|_| a.run(4, &|_| b.run(2, &|_| a.run(2, &add)))));
        }
    });
    assert_eq!(sum.load(Ordering::Relaxed), 3 * times * 16);
    assert_eq!(threads_at_work(&team), 2, "the thread that had a task is free for the next job");
}

#[test]
fn a_panic_reaches_the_caller_and_the_team_works_on() {
    let team = Team::new(2);
    let caller = std::thread::current().id();
    // In one thread's tasks, in the other's, in both.
    let panics: [fn(bool) -> bool; 3] = [|callers| callers, |callers| !callers, |_| true];
    for panics in panics {
        let came = Mutex::new(HashSet::new());
        let result = catch_unwind(AssertUnwindSafe(|| {
            team.run(2, &|i| {
                let me = std::thread::current().id();
                lock(&came).insert(me);
                // Both threads have a task, whoever is faster.
                while lock(&came).len() < 2 {
                    std::thread::yield_now();
                }
                assert!(!panics(me == caller), "task {i}");
            });
        }));
        let message = result.unwrap_err();
        assert!(message.downcast_ref::<String>().unwrap().contains("task "));
        assert_eq!(threads_at_work(&team), 2);
    }
}
