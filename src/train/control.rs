//! How others steer a run while it works: a handle for any thread, and a policy that the host supplies.
//!
//! Both are asked between layers, many times a second. A pause holds the step where it is, so it begins within a layer's
//! time and costs nothing; threads sleep meanwhile. A stop abandons the step.

use crate::adapter::AdapterFile;
use crate::error::{Error, ErrorCode, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// How often a paused run looks at its policy and its observer.
const LOOK: Duration = Duration::from_millis(20);

/// What a run shall do now; the strictest of all who are asked counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Directive {
    /// Work.
    Run,
    /// Hold the step where it is until told otherwise.
    Pause,
    /// Abandon the step, write a checkpoint and return.
    Stop,
}

/// A host's rule for when to train: only while charging, only while cool, in slices of time.
pub type Policy = Box<dyn FnMut() -> Directive + Send>;

/// Steers a run from any thread.
#[derive(Clone)]
pub struct TrainHandle(Arc<Shared>);

struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
}

struct Orders {
    wish: Directive,
    /// The run is being held right now.
    held: bool,
    /// The threads of calls of the trainer that may serve a snapshot.
    running: Vec<ThreadId>,
    snapshot: Snapshot,
}

enum Snapshot {
    None,
    Wanted,
    Ready(Box<Result<AdapterFile>>),
}

impl TrainHandle {
    pub(super) fn new() -> Self {
        let orders = Orders { wish: Directive::Run, held: false, running: Vec::new(), snapshot: Snapshot::None };
        Self(Arc::new(Shared { orders: Mutex::new(orders), changed: Condvar::new() }))
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.0.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self, directive: Directive) {
        self.orders().wish = directive;
        self.0.changed.notify_all();
    }

    /// Holds the run within a layer's time.
    pub fn pause(&self) {
        self.wish(Directive::Pause);
    }

    /// Lets it go on after a pause, or start again after a stop.
    pub fn resume(&self) {
        self.wish(Directive::Run);
    }

    /// Stops it within a layer's time, with a checkpoint of the last whole step.
    pub fn cancel(&self) {
        self.wish(Directive::Stop);
    }

    /// Whether it is held right now, by this handle or by the policy.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.orders().held
    }

    /// Waits until it is held, at most `patience`. Returns whether it is.
    #[must_use]
    pub fn wait_paused(&self, patience: Duration) -> bool {
        let wait = self.0.changed.wait_timeout_while(self.orders(), patience, |orders| !orders.held);
        wait.unwrap_or_else(PoisonError::into_inner).0.held
    }

    /// The adapter after the last whole step, as [`Trainer::snapshot`](crate::Trainer::snapshot), from a run that works
    /// or is paused on another thread. Waits for the end of a layer.
    ///
    /// # Errors
    /// No run is at work, which leaves the trainer itself to be asked; the run's own thread asks, from a callback, where it
    /// would wait for itself; a value does not fit f16.
    pub fn snapshot(&self) -> Result<AdapterFile> {
        let mut orders = self.orders();
        if orders.running.contains(&std::thread::current().id()) {
            let message = "expected another thread than the run's own, which would wait for itself in this callback; ask \
                           from another thread, or the trainer between two steps";
            return Err(Error::new(ErrorCode::Config, "snapshot", message));
        }
        loop {
            if let Snapshot::Ready(file) = std::mem::replace(&mut orders.snapshot, Snapshot::Wanted) {
                orders.snapshot = Snapshot::None;
                return *file;
            }
            if orders.running.is_empty() {
                orders.snapshot = Snapshot::None;
                let message = "expected a run at work, got none; ask the trainer for its snapshot";
                return Err(Error::new(ErrorCode::Config, "training", message));
            }
            self.0.changed.notify_all();
            orders = self.0.changed.wait_timeout(orders, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Marks a call of the trainer that serves snapshots, until dropped.
    pub(super) fn enter(&self) -> Running {
        self.orders().running.push(std::thread::current().id());
        Running(self.clone())
    }

    /// Makes the snapshot that somebody waits for.
    pub(super) fn serve(&self, make: &dyn Fn() -> Result<AdapterFile>) {
        if matches!(self.orders().snapshot, Snapshot::Wanted) {
            let file = make();
            self.orders().snapshot = Snapshot::Ready(Box::new(file));
            self.0.changed.notify_all();
        }
    }

    /// Asks everybody whether to go on; returns when the answer is yes or no, with the time of a pause.
    pub(super) fn ask(
        &self,
        others: &mut dyn FnMut() -> Directive,
        make: &dyn Fn() -> Result<AdapterFile>,
    ) -> (bool, Duration) {
        let start = Instant::now();
        let mut paused = false;
        loop {
            self.serve(make);
            // Not under the lock: the host's code may use this handle.
            let others = others();
            let mut orders = self.orders();
            let directive = orders.wish.max(others);
            orders.held = directive == Directive::Pause;
            if !orders.held {
                return (directive == Directive::Run, if paused { start.elapsed() } else { Duration::ZERO });
            }
            paused = true;
            self.0.changed.notify_all();
            drop(self.0.changed.wait_timeout(orders, LOOK));
        }
    }
}

/// See [`TrainHandle::enter`].
pub(super) struct Running(TrainHandle);

impl Drop for Running {
    fn drop(&mut self) {
        let mut orders = self.0.orders();
        let own = std::thread::current().id();
        if let Some(at) = orders.running.iter().rposition(|id| *id == own) {
            orders.running.swap_remove(at);
        }
        orders.held = false;
        drop(orders);
        self.0.0.changed.notify_all();
    }
}
