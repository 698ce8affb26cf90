//! The threads of the CPU backend: each works through a share of the tasks and then takes from the others' shares.
//!
//! Made for decoding: a token is some 150 jobs of ten to fifty microseconds each. A general thread pool wakes its threads
//! for every job, which takes as long as a job does. Here, handing out a job costs one store to memory: between jobs the
//! threads spin for some 50 microseconds before they sleep. A job ends when its tasks are done, so it never waits for a
//! thread that is asleep or that the system has taken off its core. On processors with
//! cores of unequal speed the fast ones take over what the slow ones have left, from the far end, so that each core
//! still reads its share of the weights as one stream.
//!
//! Which thread computes a task never changes the result: tasks are cut by shapes alone.
//!
//! A team works on one job at a time. Callers from several threads take turns, job by job, and each job gets all
//! threads (`turns.rs`). Only a job that begins inside a task of another may have to run on its own thread alone: it
//! takes the team if nobody has it and never waits, for the team that it would wait for may be waiting for it.

use super::turns::Turns;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Turns of the waiting loop before a thread sleeps: some 50 us.
const SPINS: u32 = 4000;

/// In [`Shared::state`]: threads may join the job; below it the number of those that have and are not done, above it
/// the job's number.
const OPEN: u64 = 1 << 16;
const JOINED: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;

/// Threads that share the tasks of one op at a time with the thread that calls it.
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turns: Turns,
}

thread_local! {
    /// Whether this thread works on a task, of whatever team.
    static IN_A_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Works on task number `i`.
type RunTask<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// See [`OPEN`].
    state: AtomicU64,
    job: UnsafeCell<Option<&'static RunTask<'static>>>,
    /// Each thread's tasks, the first in the upper half, the end in the lower; the caller's own come first.
    shares: Box<[Share]>,
    /// Threads that take part, the caller included.
    active: AtomicUsize,
    sleepers: AtomicU32,
    /// The caller sleeps until the last thread leaves its job.
    caller_sleeps: AtomicBool,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleep: Mutex<()>,
    wake: Condvar,
    done: Condvar,
}

/// On a cache line of its own, for its owner changes it with every task.
#[repr(align(128))]
struct Share(AtomicU64);

// SAFETY: `job` is all that is not `Sync` already. The caller writes it while the state is not open and nobody has
// joined (`Team::run`); others read it only after they joined an open state, which the write happened before.
#[allow(unsafe_code, reason = "a job borrows from the caller's stack, which no safe type can express")]
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference in `job` is to something `Sync`.
#[allow(unsafe_code, reason = "as above")]
unsafe impl Send for Shared {}

impl Team {
    /// `threads` in all, the caller's included; fewer if the system refuses some.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, JOINED as usize);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: (0..threads).map(|_| Share(AtomicU64::new(0))).collect(),
            active: AtomicUsize::new(1),
            sleepers: AtomicU32::new(0),
            caller_sleeps: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        let spawn = |me: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("pocketlora-{me}")).spawn(move || shared.serve(me)).ok()
        };
        let workers: Vec<_> = (1..threads).map_while(spawn).collect();
        shared.active.store(workers.len() + 1, Ordering::Relaxed);
        Self { shared, workers, turns: Turns::default() }
    }

    /// Threads there are.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Threads that take part.
    pub fn active(&self) -> usize {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// Lets only the first `threads` take part from now on.
    pub fn set_active(&self, threads: usize) {
        self.shared.active.store(threads.clamp(1, self.threads()), Ordering::Relaxed);
    }

    /// Calls `work` once for each number below `tasks`, on all threads, and returns when all calls have. While another
    /// thread's job has the team, it waits for its turn; inside a task it goes on alone instead.
    ///
    /// # Panics
    /// With the panic of a task, after all threads have left the job. Tasks that nobody had begun are left out if
    /// every thread that came has panicked. The team stays as it was.
    pub fn run(&self, tasks: usize, work: &RunTask) {
        let threads = self.active().min(tasks);
        let turn = if threads < 2 || tasks >= u32::MAX as usize {
            None
        } else if IN_A_TASK.get() {
            self.turns.try_now()
        } else {
            Some(self.turns.wait())
        };
        if turn.is_none() {
            return (0..tasks).for_each(work);
        }
        let shared = &*self.shared;
        for (i, share) in shared.shares.iter().enumerate() {
            let range = if i < threads { (tasks * i / threads, tasks * (i + 1) / threads) } else { (0, 0) };
            share.0.store(((range.0 as u64) << 32) | range.1 as u64, Ordering::Relaxed);
        }
        // SAFETY: the state is not open and nobody is joined since `finish` of the job before, and `turn` keeps other
        // callers out, so nobody reads `job`. What it points to outlives its use: `Finish` closes the state and waits
        // for all that joined before this function is left.
        #[allow(unsafe_code, reason = "the job's lifetime is held by `Finish` instead of the type")]
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<&RunTask<'_>, &'static RunTask<'static>>(work));
        }
        let number = shared.state.load(Ordering::Relaxed) / NUMBER;
        let finish = Finish(shared);
        shared.state.store(((number + 1) % NUMBER * NUMBER) | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        let nested = IN_A_TASK.replace(true);
        shared.work_through(0, work);
        IN_A_TASK.set(nested);
        drop(finish);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panics were handed to callers; there is nothing left to tell.
            let _ = worker.join();
        }
    }
}

/// Ends a job when dropped: nobody may join any more, and those who did are waited for.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        let joined = || shared.state.load(Ordering::SeqCst) & JOINED != 0;
        let mut spins = 0;
        while joined() {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // Somebody took a core away. Spinning on would cost another its time slice.
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            let mut guard = lock(&shared.sleep);
            while joined() {
                guard = shared.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            drop(guard);
            shared.caller_sleeps.store(false, Ordering::SeqCst);
        }
    }
}

impl Shared {
    /// What thread number `me` does all its life.
    fn serve(&self, me: usize) {
        IN_A_TASK.set(true);
        let mut seen = 0;
        while let Some(number) = self.next_job(me, seen) {
            seen = number;
            // SAFETY: this thread joined while the state was open: the job was written before and stays until it
            // leaves again, below.
            #[allow(unsafe_code, reason = "see `Sync for Shared`")]
            let job = unsafe { *self.job.get() };
            if let Some(work) = job {
                self.work_through(me, work);
            }
            let left = self.state.fetch_sub(1, Ordering::SeqCst) & JOINED;
            if left == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
                drop(lock(&self.sleep));
                self.done.notify_all();
            }
        }
    }

    /// Waits for a job after number `seen` and joins it; returns its number, or `None` when the team is dissolved.
    fn next_job(&self, me: usize, seen: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let takes_part = me < self.active.load(Ordering::Relaxed);
            if takes_part && state & OPEN != 0 && state / NUMBER != seen {
                if self.state.compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                    return Some(state / NUMBER);
                }
                continue;
            }
            spins += 1;
            if takes_part && spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            let guard = lock(&self.sleep);
            // Announced before the last look, as the caller looks for sleepers after it has published a job.
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) == state && !self.stop.load(Ordering::SeqCst) {
                drop(self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
    }

    /// The own share from the front, then the others' from the back, the largest first. Stops at a panic and keeps the
    /// first one of a job.
    fn work_through(&self, me: usize, work: &RunTask) {
        let work_through = || {
            while let Some(task) = self.shares[me].first() {
                work(task);
            }
            while let Some(share) = self.shares.iter().max_by_key(|share| share.left()).filter(|share| share.left() > 0)
            {
                if let Some(task) = share.last() {
                    work(task);
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work_through)) {
            lock(&self.panic).get_or_insert(panic);
        }
    }
}

impl Share {
    fn left(&self) -> u64 {
        let range = self.0.load(Ordering::Relaxed);
        (range & u64::from(u32::MAX)).saturating_sub(range >> 32)
    }

    fn first(&self) -> Option<usize> {
        self.take(|start, end| ((start + 1) << 32) | end).map(|range| (range >> 32) as usize)
    }

    fn last(&self) -> Option<usize> {
        self.take(|start, end| (start << 32) | (end - 1)).map(|range| (range & u64::from(u32::MAX)) as usize - 1)
    }

    /// Shrinks the range, if anything is left of it, and returns what it was. Tasks hand over no data among each
    /// other, so no ordering is asked for; the job's own state orders everything before and after.
    fn take(&self, shrink: impl Fn(u64, u64) -> u64) -> Option<u64> {
        let next = |range: u64| {
            let (start, end) = (range >> 32, range & u64::from(u32::MAX));
            (start < end).then(|| shrink(start, end))
        };
        self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
