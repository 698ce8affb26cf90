//! Wishes to stop: Ctrl-C, the system's SIGTERM and SIGHUP, and a stdout that takes nothing any more. The first asks the
//! running work to stop, which keeps its state. Another Ctrl-C before it did ends the program; the others come twice
//! from some senders, such as a terminal that is closed and its shell.

use super::out;
use crate::engine::Cancel;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const CTRL_C: i32 = 2;

/// Number of the signal that asked, 0 for none.
static ASKED: AtomicI32 = AtomicI32::new(0);
/// Nothing is at work that could look at a wish.
static IDLE: AtomicBool = AtomicBool::new(false);

/// The wish as chats look at it, which ask between the layers of a prompt, too.
pub(super) fn cancel() -> Cancel {
    static CANCEL: OnceLock<Cancel> = OnceLock::new();
    CANCEL.get_or_init(Cancel::new).clone()
}

fn received(signal: i32) {
    cancel().cancel();
    let first = ASKED.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed).is_ok();
    let again = signal == CTRL_C && !first;
    if again || signal != CTRL_C && IDLE.load(Ordering::Relaxed) {
        std::process::exit(128 + signal);
    }
}

/// Starts to listen. A system that refuses leaves signals with their usual meaning.
#[cfg(unix)]
pub(super) fn install() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let hang_up = (!ignores(SIGHUP)).then_some(SIGHUP);
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM].into_iter().chain(hang_up)) else {
        return;
    };
    let listen = move || signals.forever().for_each(received);
    let _ = std::thread::Builder::new().name("signals".into()).spawn(listen);
}

#[cfg(not(unix))]
pub(super) fn install() {
    let _ = ctrlc::set_handler(|| received(CTRL_C));
}

/// Whether whoever started the program wants a signal to do nothing, as `nohup` does. Only Linux tells without `unsafe`.
#[cfg(unix)]
fn ignores(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Whether the work should stop.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0 || out::failed()
}

/// Whether it should; forgets a Ctrl-C, for programs that go on.
pub(super) fn take() -> bool {
    let asked = asked();
    let _ = ASKED.compare_exchange(CTRL_C, 0, Ordering::Relaxed, Ordering::Relaxed);
    if !self::asked() {
        cancel().reset();
    }
    asked
}

/// Does `work` that looks at no wishes, such as waiting for a line: what is not Ctrl-C ends the program meanwhile.
pub(super) fn idle<T>(work: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::Relaxed);
    let done = work();
    IDLE.store(false, Ordering::Relaxed);
    done
}
