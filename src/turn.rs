//! Who may give the device work: one thread at a time, in the order in which they asked.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// A device's queue of threads. Clones are of the same queue.
///
/// Whoever has the turn holds it for as long as the device should not change hands: a chat for one token or one chunk of
/// a prompt, a trainer for one layer. Code of the host's, such as a callback, runs while the turn is given up: it may use
/// the same engine.
#[derive(Clone, Default)]
pub(crate) struct Turn(Arc<Shared>);

#[derive(Default)]
struct Shared {
    line: Mutex<Line>,
    moved: Condvar,
}

/// Numbers are drawn on arrival and served in order.
#[derive(Default)]
struct Line {
    drawn: u64,
    served: u64,
    owner: Option<ThreadId>,
}

/// The turn, given up when dropped.
pub(crate) struct TurnGuard<'t>(&'t Turn);

impl Turn {
    /// Waits for the turn.
    ///
    /// # Panics
    /// This thread has it: it would wait for itself.
    pub fn take(&self) -> TurnGuard<'_> {
        let mut line = self.line();
        assert_ne!(line.owner, Some(thread::current().id()), "a thread took its turn twice");
        let number = line.drawn;
        line.drawn += 1;
        while line.served != number {
            line = self.0.moved.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.owner = Some(thread::current().id());
        TurnGuard(self)
    }

    /// Gives the turn up while `work` runs. Those who wait come first.
    pub fn without<R>(&self, work: impl FnOnce() -> R) -> R {
        struct Back<'t>(&'t Turn);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                // Its owner is who called, and gives it up in turn.
                std::mem::forget(self.0.take());
            }
        }
        self.pass();
        let _back = Back(self);
        work()
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self) {
        let mut line = self.line();
        line.owner = None;
        line.served += 1;
        drop(line);
        self.0.moved.notify_all();
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.pass();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_thread_works_at_a_time_and_none_waits_for_ever() {
        let (turn, inside, done) = (Turn::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|s| {
            // It comes back at once, as a trainer does between layers, and stops when the others had their turns.
            s.spawn(|| {
                let _held = turn.take();
                while done.load(Ordering::SeqCst) < 20 {
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    turn.without(|| ());
                }
            });
            for _ in 0..2 {
                s.spawn(|| {
                    for _ in 0..10 {
                        let _held = turn.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 20);
    }

    #[test]
    fn a_panic_gives_the_turn_up_once_and_a_second_turn_is_a_bug() {
        let turn = Turn::default();
        for _ in 0..2 {
            let panics = catch_unwind(AssertUnwindSafe(|| {
                let _held = turn.take();
                turn.without(|| panic!("on purpose"))
            }));
            assert!(panics.is_err());
        }
        let held = turn.take();
        assert!(catch_unwind(AssertUnwindSafe(|| turn.take())).is_err());
        drop(held);
        drop(turn.take());
    }
}
