//! Ctrl-C: the first asks the running work to stop, a second one before it did ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Starts to listen. A system that refuses leaves Ctrl-C with its usual meaning.
pub(super) fn install() {
    let _ = ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
}

/// Whether the work should stop.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Whether it should have; forgets the wish, for programs that go on.
pub(super) fn take() -> bool {
    ASKED.swap(false, Ordering::Relaxed)
}
