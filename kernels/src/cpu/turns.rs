//! Who may use the team of threads next: callers from several threads take turns.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Jobs that other callers may begin while one waits. Handing the team over means waking a thread, which takes as long
/// as one of decoding's jobs; after this many, the pause is small beside what was done.
const PATIENCE: u32 = 16;

/// A lock that nobody waits for in vain: [`Mutex`] alone gives itself again and again to a caller that comes back at
/// once, as one does between two operations.
#[derive(Default)]
pub(super) struct Turns {
    /// Held by the caller whose job the team works on.
    team: Mutex<()>,
    /// Held by the caller that is next. All others wait behind it.
    line: Mutex<()>,
    /// Callers that hold `line`: one or none.
    waiting: AtomicU32,
    /// Jobs that began since the caller in `line` came.
    passed: AtomicU32,
}

impl Turns {
    /// Waits for the team. Must not be called by a thread that works on a job of any team: two such threads could wait
    /// for each other.
    pub fn wait(&self) -> MutexGuard<'_, ()> {
        let may_pass =
            self.waiting.load(Ordering::Relaxed) == 0 || self.passed.fetch_add(1, Ordering::Relaxed) < PATIENCE;
        if may_pass && let Some(team) = self.try_now() {
            return team;
        }
        let _line = lock(&self.line);
        self.passed.store(0, Ordering::Relaxed);
        self.waiting.store(1, Ordering::Relaxed);
        let team = lock(&self.team);
        self.waiting.store(0, Ordering::Relaxed);
        team
    }

    /// The team, if nobody has it.
    pub fn try_now(&self) -> Option<MutexGuard<'_, ()>> {
        match self.team.try_lock() {
            Ok(team) => Some(team),
            // The locks guard no data, so a panic leaves nothing behind that a later caller could find broken.
            Err(TryLockError::Poisoned(team)) => Some(team.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_that_comes_back_at_once_lets_others_pass() {
        let (turns, other_was_here) = (Turns::default(), AtomicU32::new(0));
        let first = turns.wait();
        std::thread::scope(|s| {
            s.spawn(|| {
                let _team = turns.wait();
                other_was_here.store(1, Ordering::Relaxed);
            });
            while turns.waiting.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            // It goes to sleep, as it does in use: then whoever comes back at once is faster.
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(first);
            let mut passed = 0;
            loop {
                let _team = turns.wait();
                if other_was_here.load(Ordering::Relaxed) == 1 {
                    break;
                }
                passed += 1;
                assert!(passed <= PATIENCE, "{passed} jobs before the one that waits");
            }
        });
    }

    #[test]
    fn a_panic_does_not_keep_the_team() {
        let turns = Turns::default();
        std::thread::scope(|s| {
            let holder = s.spawn(|| {
                let _team = turns.wait();
                panic!("on purpose");
            });
            assert!(holder.join().is_err());
        });
        assert!(turns.try_now().is_some());
        drop(turns.wait());
    }
}
