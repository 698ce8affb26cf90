//! Training.

use super::engine::EngineBox;
use super::handle::only;
use super::{Failure, Held, Out, Str, guarded, handle, held, sized};
use crate::engine::{Begun, Engine, Lesson, LessonData, Start, Trainer};
use crate::error::{Error, ErrorCode, Result};
use crate::train::{Check, Directive, Evaluation, Observer, StepReport, Summary, TrainHandle};
use std::ffi::c_void;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A run between two steps, or at work.
pub struct TrainerBox {
    trainer: Mutex<Trainer>,
    handle: TrainHandle,
    engine: Engine,
    resumed: bool,
    refuses_worse: bool,
}
held!(TrainerBox, "trainer");

/// The flag of `pl_train_options` for fixed defaults in the place of settings that a short probe chooses.
pub const FIXED_SETTINGS: u32 = 1;
/// The flag that refuses an adapter that answers what was held out worse than before: see
/// `pl_trainer_run`.
pub const REFUSE_WORSE: u32 = 2;

/// What a run learns, and how. All zero but the size, `data` or `lines`, and `out` is the usual way.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// `sizeof(pl_train_options)`.
    pub size: u32,
    /// What becomes of an earlier run in `out`: 0 it stays, and the new one is refused; 1 its adapter and checkpoint give way to
    /// the new run's, when there are some; 2 it goes on from its checkpoint (without one a new run begins, and a finished one is
    /// refused). Files that no run wrote are never touched; a model's folder is refused.
    pub start: u32,
    /// `PL_FIXED_SETTINGS`, `PL_REFUSE_WORSE`, or'ed.
    pub flags: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// A file or folder of data; not together with `lines`.
    pub data: Str,
    /// Data itself, an object of JSON a line; it is kept in `out`. With neither, a run that goes on has the lines that it
    /// began with.
    pub lines: Str,
    /// The folder for checkpoints and the adapter.
    pub out: Str,
    /// Settings that are given: keys of `train.toml` (`pocketlora train --help` lists them), as TOML or as one object of JSON.
    pub settings: Str,
    /// The folder of an adapter to train on; empty for a new one.
    pub init: Str,
    /// Seconds that choosing settings and training may take; 0 for as long as it gets better.
    pub seconds: f64,
}
// SAFETY: plain numbers and texts behind a size.
unsafe impl sized::Sized for TrainOptions {}

const NO_OPTIONS: TrainOptions = TrainOptions {
    size: size_of::<TrainOptions>() as u32,
    start: 0,
    flags: 0,
    reserved: 0,
    data: Str::NONE,
    lines: Str::NONE,
    out: Str::NONE,
    settings: Str::NONE,
    init: Str::NONE,
    seconds: 0.0,
};

/// Something that a run tells. What an event does not have is 0, or NaN.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrainEvent {
    /// `sizeof(pl_train_event)`; a newer library's may be larger.
    pub size: u32,
    /// 1 a step was done, 2 the adapter's beginning is computed, 3 general prompts are answered on which the model will be
    /// held, 4 the adapter is checked, 5 something is wrong that training outlives (`message`).
    pub kind: u32,
    /// Number of the step, from 1.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Of 2 to 4: how many of `all` are done.
    pub done: u64,
    /// Of 2 to 4: layers, texts, prompts or samples in all.
    pub all: u64,
    /// Mean loss of the learned tokens (natural log), before the step.
    pub loss: f64,
    /// Mean loss on what is held out, where this step ended with that.
    pub held_out_loss: f64,
    /// Tokens a second.
    pub token_rate: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// For people; it lives until the call returns.
    pub message: Str,
}

/// Who watches a run. Each function may be null.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainListener {
    /// `sizeof(pl_train_listener)`.
    pub size: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// Given to each function.
    pub user: *mut c_void,
    /// Hears of each event. `PL_RUN` goes on. `PL_PAUSE` is as an order to pause: it holds the run until `pl_trainer_order` says
    /// `PL_RUN`, and does nothing in `pl_trainer_new`, where there is no run yet. `PL_STOP` ends the run with a checkpoint, and
    /// `pl_trainer_new` with `PL_CODE_CANCELLED`.
    pub on_event: Option<extern "C" fn(user: *mut c_void, event: *const TrainEvent) -> u32>,
    /// Asked many times a second, between layers, what the run is to do now: whether the device charges, is cool, is idle. Of it
    /// and the last order the stricter one counts.
    pub policy: Option<extern "C" fn(user: *mut c_void) -> u32>,
}
// SAFETY: addresses and functions, of which any that C hands in are values, behind a size.
unsafe impl sized::Sized for TrainListener {}

const NO_LISTENER: TrainListener = TrainListener {
    size: size_of::<TrainListener>() as u32,
    reserved: 0,
    user: std::ptr::null_mut(),
    on_event: None,
    policy: None,
};

/// Goes on.
pub const RUN: u32 = 0;
/// Holds the run where it is, within a layer's time.
pub const PAUSE: u32 = 1;
/// Ends it with a checkpoint of the last whole step, within a layer's time.
pub const STOP: u32 = 2;

/// What `wish` of C's asks for; what is none of the three stops, which loses nothing.
fn directive(wish: u32) -> Directive {
    match wish {
        RUN => Directive::Run,
        PAUSE => Directive::Pause,
        _ => Directive::Stop,
    }
}

/// Hands a run's events to C.
struct Watcher {
    listener: TrainListener,
    /// None before there is a run.
    handle: Option<TrainHandle>,
    stopped: bool,
}

impl Watcher {
    fn tell(&mut self, event: &TrainEvent) -> ControlFlow<()> {
        let wish = self.listener.on_event.map_or(RUN, |hear| hear(self.listener.user, event));
        match directive(wish) {
            Directive::Run => ControlFlow::Continue(()),
            Directive::Pause => {
                self.handle.iter().for_each(TrainHandle::pause);
                ControlFlow::Continue(())
            }
            Directive::Stop => {
                self.stopped = true;
                ControlFlow::Break(())
            }
        }
    }

    fn count(&mut self, kind: u32, done: usize, all: usize, message: &str) {
        let event = TrainEvent { done: done as u64, all: all as u64, message: Str::of(message), ..event(kind) };
        // It is asked right after, and stops then.
        let _ = self.tell(&event);
    }
}

/// An event of `kind` that tells nothing yet.
fn event(kind: u32) -> TrainEvent {
    let (none, size) = (f64::NAN, size_of::<TrainEvent>() as u32);
    TrainEvent {
        size,
        kind,
        step: 0,
        steps: 0,
        done: 0,
        all: 0,
        loss: none,
        held_out_loss: none,
        token_rate: none,
        learning_rate: none,
        message: Str::NONE,
    }
}

/// What C hears of a step.
fn of_step(report: &StepReport) -> TrainEvent {
    let seconds = report.time.as_secs_f64();
    TrainEvent {
        step: report.step,
        steps: report.total_steps,
        loss: report.loss,
        held_out_loss: report.eval_loss.unwrap_or(f64::NAN),
        token_rate: if seconds > 0.0 { report.tokens as f64 / seconds } else { 0.0 },
        learning_rate: f64::from(report.lr),
        ..event(1)
    }
}

impl Observer for Watcher {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.tell(&of_step(report))
    }

    fn keep_going(&mut self) -> bool {
        loop {
            match self.listener.policy.map_or(Directive::Run, |ask| directive(ask(self.listener.user))) {
                Directive::Run => return !self.stopped,
                Directive::Stop => return false,
                // Blocking here pauses the run, and another thread may still order it to stop.
                Directive::Pause if self.stopped => return false,
                Directive::Pause if self.handle.is_some() => return true,
                Directive::Pause => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn on_beginning(&mut self, done: usize, all: usize) {
        self.count(2, done, all, "");
    }

    fn on_preparing(&mut self, done: usize, prompts: usize) {
        self.count(3, done, prompts, "");
    }

    fn on_checking(&mut self, what: Check, done: usize, all: usize) {
        self.count(4, done, all, &what.to_string());
    }

    fn on_warning(&mut self, warning: &Error) {
        self.count(5, 0, 0, &warning.to_string());
    }
}

/// Prepares a run on an open model: reads the data, and chooses the settings that are not given by a short probe, of which
/// `listener` (or null) hears. The adapter is written when the run ends; chats of the model go on meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_new(
    engine: *const EngineBox,
    options: *const TrainOptions,
    listener: *const TrainListener,
    trainer: *mut *mut TrainerBox,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(trainer, "trainer")?);
        // SAFETY: the header's rules for structs, texts and places of results.
        unsafe {
            let given = sized::read(options, NO_OPTIONS, "pl_train_options")?;
            let listener = sized::read(listener, NO_LISTENER, "pl_train_listener")?;
            let (path, lines) = (given.data.path("data")?, given.lines.bytes("lines")?);
            let (out, init) = (given.out.needed_path("out")?, given.init.path("init")?);
            let data = match (&path, lines) {
                (Some(_), [_, ..]) => return Err(Error::config("lines", "either `data` or `lines`", "both")),
                (Some(path), _) => LessonData::Path(path),
                (None, []) => LessonData::Kept,
                (None, lines) => LessonData::Lines(lines),
            };
            let lesson = Lesson {
                settings: given.settings.text("settings")?,
                init: init.as_deref(),
                start: start(given.start)?,
                auto: given.flags & FIXED_SETTINGS == 0,
                end: end(given.seconds)?,
                ..Lesson::new(data, &out)
            };
            if given.flags & !(FIXED_SETTINGS | REFUSE_WORSE) != 0 {
                return Err(Error::config("flags", "`PL_FIXED_SETTINGS` and `PL_REFUSE_WORSE`, or'ed", given.flags));
            }
            let mut watcher = Watcher { listener, handle: None, stopped: false };
            let Begun { trainer, resumed, choice } = engine.0.begin(&lesson, &mut watcher)?;
            let said = choice.into_iter().flat_map(|choice| choice.doubts);
            said.for_each(|doubt| watcher.count(5, 0, 0, &doubt));
            let held = TrainerBox {
                handle: trainer.handle(),
                trainer: Mutex::new(trainer),
                engine: engine.0.clone(),
                resumed,
                refuses_worse: given.flags & REFUSE_WORSE != 0,
            };
            place.set(held.hold());
        }
        Ok(())
    })
}

fn start(number: u32) -> Result<Start> {
    Ok(match number {
        0 => Start::New,
        1 => Start::Replace,
        2 => Start::Resume,
        other => return Err(Error::config("start", "0 (new), 1 (replace) or 2 (resume)", other)),
    })
}

fn end(seconds: f64) -> Result<Option<Instant>> {
    if seconds == 0.0 {
        return Ok(None);
    }
    let time = Duration::try_from_secs_f64(seconds).ok().and_then(|time| Instant::now().checked_add(time));
    time.map(Some).ok_or_else(|| Error::config("seconds", "a time in seconds, or 0 for no bound", seconds))
}

/// Frees a run. One that is at work or held is stopped first, with a checkpoint, and `pl_trainer_run` returns; steps that were
/// done one by one and not saved are lost.
#[unsafe(no_mangle)]
pub extern "C" fn pl_trainer_free(trainer: *mut TrainerBox) {
    // Held, it would wait for an order that nobody can give any more.
    TrainerBox::of(trainer).iter().for_each(|held| held.handle.cancel());
    handle::free(trainer);
}

/// What a run is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrainerInfo {
    /// `sizeof(pl_trainer_info)`, set by the caller.
    pub size: u32,
    /// Whether it goes on from a checkpoint.
    pub resumed: u32,
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Numbers that are trained.
    pub parameters: u64,
    /// Anonymous bytes that the run takes: planned, and kept to.
    pub planned: u64,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for TrainerInfo {}

/// Tells what a run is, between two steps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_info_of(
    trainer: *const TrainerBox,
    info: *mut TrainerInfo,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let held = TrainerBox::of(trainer)?;
        let trainer = only(&held.trainer, TrainerBox::NAME)?;
        let value = TrainerInfo {
            size: 0,
            resumed: u32::from(held.resumed),
            step: trainer.step_number(),
            steps: trainer.total_steps(),
            parameters: trainer.trained_parameters() as u64,
            planned: trainer.plan().anonymous(),
        };
        // SAFETY: the header's rule for places of results.
        unsafe { sized::write(info, &value, "pl_trainer_info") }
    })
}

/// What a run did. What was not measured is NaN, or -1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrainSummary {
    /// `sizeof(pl_train_summary)`, set by the caller.
    pub size: u32,
    /// 1 where the run came to its end and the adapter is written; 0 where it was stopped with a checkpoint.
    pub done: u32,
    /// Steps done, those before a resume included.
    pub steps: u64,
    /// Tokens learned in this process.
    pub trained_tokens: u64,
    /// Seconds in this process.
    pub seconds: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// Loss on what is held out, before the run.
    pub held_out_before: f64,
    /// The same of the adapter that is written.
    pub held_out_after: f64,
    /// General questions asked.
    pub asked: i64,
    /// Of these, answered rightly before the run.
    pub known_before: i64,
    /// And with the adapter that is written.
    pub known_after: i64,
    /// Highest anonymous bytes of the process seen; 0 where the system does not tell.
    pub peak_anonymous: u64,
    /// 1 where what is held out is answered worse than before.
    pub is_worse: u32,
    /// 1 where it ended because its time was over.
    pub out_of_time: u32,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for TrainSummary {}

impl TrainSummary {
    fn of(summary: &Summary) -> Self {
        let (before, after) = (summary.before.unwrap_or_default(), summary.of_adapter());
        let known = |found: &Evaluation| found.known.map_or(-1, |known| i64::from(known.count()));
        let (was, is) = (before.held_out.unwrap_or(f64::NAN), after.held_out.unwrap_or(f64::NAN));
        Self {
            size: 0,
            done: u32::from(summary.done),
            steps: summary.steps,
            trained_tokens: summary.trained_tokens,
            seconds: summary.time.as_secs_f64(),
            loss: summary.loss,
            held_out_before: was,
            held_out_after: is,
            asked: summary.asked as i64,
            known_before: known(&before),
            known_after: known(&after),
            peak_anonymous: summary.peak_anonymous_bytes.unwrap_or(0),
            is_worse: u32::from(is > was),
            out_of_time: u32::from(summary.out_of_time),
        }
    }
}

/// Runs to the end, or until the listener, its policy or `pl_trainer_order` stops it; then writes the adapter, or a
/// checkpoint. It takes the time that training takes: call it on a thread of its own. `listener` and `summary` may be null.
///
/// With `PL_REFUSE_WORSE`, a run whose adapter answers what is held out worse than the model did before fails with
/// `PL_CODE_DIVERGED`: the adapter is in its folder, and is not to be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_run(
    trainer: *const TrainerBox,
    listener: *const TrainListener,
    summary: *mut TrainSummary,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let held = TrainerBox::of(trainer)?;
        // SAFETY: the header's rules for structs and places of results.
        let listener = unsafe {
            if !summary.is_null() {
                sized::check_place(summary, "pl_train_summary")?;
            }
            sized::read(listener, NO_LISTENER, "pl_train_listener")?
        };
        let mut trainer = only(&held.trainer, TrainerBox::NAME)?;
        trainer.set_policy(policy(listener));
        let quiet = TrainListener { policy: None, ..listener };
        let run = trainer.run(&mut Watcher { listener: quiet, handle: Some(held.handle.clone()), stopped: false });
        // The functions are the caller's for this call alone.
        trainer.set_policy(Box::new(|| Directive::Run));
        let run = run?;
        let value = TrainSummary::of(&run);
        if !summary.is_null() {
            // SAFETY: the header's rule for places of results.
            unsafe { sized::write(summary, &value, "pl_train_summary") }?;
        }
        if held.refuses_worse && value.is_worse == 1 {
            let message = format!(
                "expected a loss on held-out data below the model's own of {:.4}, got {:.4}; do not use this adapter: give \
                 more data, fewer epochs or a lower learning rate",
                value.held_out_before, value.held_out_after
            );
            return Err(Error::new(ErrorCode::Diverged, format!("`{}`", run.adapter.display()), message));
        }
        Ok(())
    })
}

/// C's rule for when to train, as the engine asks it.
fn policy(listener: TrainListener) -> crate::train::Policy {
    /// An address that C gave for its own function.
    struct User(*mut c_void);
    // SAFETY: it is never followed here, and the header says that callbacks come on the thread of the call.
    unsafe impl Send for User {}
    let user = User(listener.user);
    let Some(ask) = listener.policy else { return Box::new(|| Directive::Run) };
    Box::new(move || {
        let user = &user;
        directive(ask(user.0))
    })
}

/// Does one step, for apps that train in slices of their own; `event` (or null) becomes what it did. After the last step
/// `pl_trainer_run` writes the adapter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_step(
    trainer: *const TrainerBox,
    event: *mut TrainEvent,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let held = TrainerBox::of(trainer)?;
        let mut trainer = only(&held.trainer, TrainerBox::NAME)?;
        let report =
            trainer.step(&mut Watcher { listener: NO_LISTENER, handle: Some(held.handle.clone()), stopped: false })?;
        if event.is_null() {
            return Ok(());
        }
        // SAFETY: the header's rule for places of results.
        unsafe { sized::write(event, &of_step(&report), "pl_train_event") }
    })
}
// SAFETY: plain numbers and a text behind a size.
unsafe impl sized::Sized for TrainEvent {}

/// Orders a run from any thread, also while it is at work: `PL_PAUSE` holds it within a layer's time, `PL_RUN` lets it go on,
/// `PL_STOP` ends `pl_trainer_run` with a checkpoint. An order holds until the next one.
#[unsafe(no_mangle)]
pub extern "C" fn pl_trainer_order(trainer: *const TrainerBox, order: u32, error: *mut *mut Failure) -> u32 {
    guarded(error, || {
        let held = TrainerBox::of(trainer)?;
        match order {
            RUN => held.handle.resume(),
            PAUSE => held.handle.pause(),
            STOP => held.handle.cancel(),
            other => return Err(Error::config("order", "`PL_RUN`, `PL_PAUSE` or `PL_STOP`", other)),
        }
        Ok(())
    })
}

/// Waits until a run is held, at most so many seconds; `paused` becomes 1 if it is, and 0 if not, also where the run has not
/// begun or has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_wait_paused(
    trainer: *const TrainerBox,
    seconds: f64,
    paused: *mut u32,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (held, place) = (TrainerBox::of(trainer)?, Out::new(paused, "paused")?);
        let time =
            Duration::try_from_secs_f64(seconds).map_err(|_| Error::config("seconds", "a time in seconds", seconds))?;
        let is = held.handle.wait_paused(time);
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(u32::from(is)) }
        Ok(())
    })
}

/// Writes a checkpoint between two steps, from which the run can go on in another process.
#[unsafe(no_mangle)]
pub extern "C" fn pl_trainer_save(trainer: *const TrainerBox, error: *mut *mut Failure) -> u32 {
    guarded(error, || {
        let held = TrainerBox::of(trainer)?;
        only(&held.trainer, TrainerBox::NAME)?.save_checkpoint()
    })
}

/// Attaches the adapter as it is after the last whole step, also while the run is at work or held: what was learned so far
/// can be tried. `number` becomes what it is called by.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_trainer_attach(
    trainer: *const TrainerBox,
    scale: f32,
    number: *mut u64,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (held, place) = (TrainerBox::of(trainer)?, Out::new(number, "number")?);
        let file = match only(&held.trainer, TrainerBox::NAME) {
            Ok(trainer) => trainer.snapshot()?,
            Err(e) if e.code() == ErrorCode::Busy => held.handle.snapshot()?,
            Err(e) => return Err(e),
        };
        let id = held.engine.attach_file(file, scale)?;
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(id.number()) }
        Ok(())
    })
}
