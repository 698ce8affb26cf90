//! Training.

use crate::adapters::held;
use crate::engine::parse;
use crate::failure::Failure;
use crate::handles::{Held, TrainerHeld, engine, hold, only, trainer};
use crate::{longs, native, optional, text};
use jni::objects::{JLongArray, JObject, JString, JValue};
use jni::{Env, jni_sig, jni_str};
use pocketlora::train::Check;
use pocketlora::{Begun, Error, Lesson, LessonData, Observer, Start, StepReport, Summary, TrainHandle};
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What Kotlin's `TrainingOptions` become.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    out: String,
    /// A file or folder of data; the lines that come beside this, or those of the run's folder, where it is null.
    data: Option<String>,
    start: String,
    init: Option<String>,
    choose: bool,
    seconds: Option<f64>,
    settings: serde_json::Value,
}

native!(Java_io_pocketlora_Native_trainerNew(
    env, handle: i64, json: JString<'local>, lines: JString<'local>, listener: JObject<'local>,
) -> i64 {
    let (engine, json, lines) = (engine(handle)?, text(env, &json)?, optional(env, &lines)?);
    let given: Given = parse("training options", &json)?;
    let data = match (&given.data, &lines) {
        (Some(path), _) => LessonData::Path(Path::new(path)),
        (None, Some(lines)) => LessonData::Lines(lines.as_bytes()),
        (None, None) => LessonData::Kept,
    };
    let start = match given.start.as_str() {
        "new" => Start::New,
        "replace" => Start::Replace,
        "resume" => Start::Resume,
        other => return Err(Error::config("start", "`new`, `replace` or `resume`", other).into()),
    };
    let seconds = given.seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let (out, settings) = (Path::new(&given.out), given.settings.to_string());
    let lesson = Lesson {
        settings: &settings,
        init: given.init.as_deref().map(Path::new),
        start,
        auto: given.choose,
        end: seconds.and_then(|seconds| Instant::now().checked_add(seconds)),
        ..Lesson::new(data, out)
    };
    let mut heard = Heard { env, listener: &listener, handle: None, failed: None, stopped: false };
    let begun = engine.begin(&lesson, &mut heard);
    if let Some(failure) = heard.failed {
        return Err(failure);
    }
    let Begun { trainer, resumed, choice } = begun?;
    choice.into_iter().flat_map(|choice| choice.doubts).for_each(|doubt| heard.tell(3, 0, 0, &doubt));
    if let Some(failure) = heard.failed {
        return Err(failure);
    }
    let handle = trainer.handle();
    Ok(hold(Held::Trainer(Arc::new(TrainerHeld { trainer: Mutex::new(trainer), handle, engine, resumed }))))
});

native!(Java_io_pocketlora_Native_trainerRun(env, number: i64, listener: JObject<'local>) -> () {
    let held = trainer(number)?;
    let mut trainer = only(&held.trainer, "trainer")?;
    let handle = Some(held.handle.clone());
    let mut heard = Heard { env, listener: &listener, handle, failed: None, stopped: false };
    let summary = trainer.run(&mut heard);
    drop(trainer);
    match heard.failed {
        Some(failure) => Err(failure),
        None => tell_end(env, &listener, &summary?),
    }
});

native!(Java_io_pocketlora_Native_trainerOrder(_env, number: i64, order: i32) -> () {
    let handle = &trainer(number)?.handle;
    match order {
        0 => handle.resume(),
        1 => handle.pause(),
        _ => handle.cancel(),
    }
    Ok(())
});

native!(Java_io_pocketlora_Native_trainerWaitPaused(_env, number: i64, milliseconds: i64) -> bool {
    let handle = trainer(number)?.handle.clone();
    Ok(handle.wait_paused(Duration::from_millis(milliseconds.max(0) as u64)))
});

native!(Java_io_pocketlora_Native_trainerSnapshot(_env, number: i64, scale: f32) -> i64 {
    let trainer = trainer(number)?;
    let file = match trainer.trainer.try_lock() {
        Ok(idle) => idle.snapshot()?,
        // At work: the run itself makes it, between two steps or while it is held.
        Err(_) => trainer.handle.snapshot()?,
    };
    let id = trainer.engine.attach_file(file, scale)?;
    Ok(held(trainer.engine.clone(), id))
});

native!(Java_io_pocketlora_Native_trainerSave(_env, number: i64, adapter: bool) -> () {
    let held = trainer(number)?;
    let mut trainer = only(&held.trainer, "trainer")?;
    Ok(if adapter { trainer.save_adapter() } else { trainer.save_checkpoint() }?)
});

native!(Java_io_pocketlora_Native_trainerInfo(env, number: i64) -> JLongArray<'local> {
    let held = trainer(number)?;
    let trainer = only(&held.trainer, "trainer")?;
    let values = [
        trainer.step_number() as i64, trainer.total_steps() as i64, trainer.trained_parameters() as i64,
        trainer.plan().anonymous() as i64, i64::from(held.resumed),
    ];
    longs(env, &values)
});

/// Hands a run's events to Kotlin.
struct Heard<'a, 'local> {
    env: &'a mut Env<'local>,
    listener: &'a JObject<'local>,
    /// None before there is a run.
    handle: Option<TrainHandle>,
    failed: Option<Failure>,
    stopped: bool,
}

impl Heard<'_, '_> {
    /// Notes whether a call went well.
    fn note<T>(&mut self, result: Result<T, Failure>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(failure) => {
                self.failed.get_or_insert(failure);
                None
            }
        }
    }

    /// Progress of `kind`, or a warning.
    fn tell(&mut self, kind: i32, done: usize, all: usize, what: &str) {
        if self.failed.is_some() {
            return;
        }
        let listener = self.listener;
        let told = self.env.with_local_frame(4, |env| -> Result<(), Failure> {
            let what = JString::new(env, what)?;
            let args = [JValue::Int(kind), JValue::Long(done as i64), JValue::Long(all as i64), (&what).into()];
            Ok(env.call_method(listener, jni_str!("onProgress"), jni_sig!("(IJJLjava/lang/String;)V"), &args)?.v()?)
        });
        self.note(told);
    }
}

impl Observer for Heard<'_, '_> {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if self.failed.is_some() {
            return ControlFlow::Break(());
        }
        let seconds = report.time.as_secs_f64();
        let rate = if seconds > 0.0 { report.tokens as f64 / seconds } else { 0.0 };
        let args = [
            JValue::Long(report.step as i64),
            JValue::Long(report.total_steps as i64),
            JValue::Double(report.loss),
            JValue::Double(report.eval_loss.unwrap_or(f64::NAN)),
            JValue::Double(rate),
            JValue::Double(f64::from(report.lr)),
        ];
        let told = self.env.call_method(self.listener, jni_str!("onStep"), jni_sig!("(JJDDDD)Z"), &args);
        match self.note(told.and_then(|wish| wish.z()).map_err(Into::into)) {
            Some(true) => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    fn keep_going(&mut self) -> bool {
        while self.failed.is_none() && !self.stopped {
            let wish = self.env.call_method(self.listener, jni_str!("policy"), jni_sig!("()I"), &[]);
            match self.note(wish.and_then(|wish| wish.i()).map_err(Into::into)) {
                Some(0) => return true,
                Some(1) => {
                    // Blocking here pauses the run. A handle's order is looked at where the run itself waits.
                    std::thread::sleep(Duration::from_millis(20));
                    if self.handle.is_some() {
                        return true;
                    }
                }
                _ => self.stopped = true,
            }
        }
        false
    }

    fn on_beginning(&mut self, done: usize, all: usize) {
        self.tell(0, done, all, "");
    }

    fn on_preparing(&mut self, done: usize, prompts: usize) {
        self.tell(1, done, prompts, "");
    }

    fn on_checking(&mut self, what: Check, done: usize, all: usize) {
        self.tell(2, done, all, &what.to_string());
    }

    fn on_warning(&mut self, warning: &Error) {
        self.tell(3, 0, 0, &warning.to_string());
    }
}

fn tell_end(env: &mut Env<'_>, listener: &JObject<'_>, summary: &Summary) -> Result<(), Failure> {
    let (before, after) = (summary.before.unwrap_or_default(), summary.of_adapter());
    let adapter = JString::new(env, summary.adapter.to_string_lossy())?;
    let args = [
        JValue::Bool(summary.done),
        JValue::Long(summary.steps as i64),
        JValue::Double(summary.loss),
        JValue::Double(before.held_out.unwrap_or(f64::NAN)),
        JValue::Double(after.held_out.unwrap_or(f64::NAN)),
        JValue::Double(summary.time.as_secs_f64()),
        JValue::Long(summary.peak_anonymous_bytes.unwrap_or(0) as i64),
        (&adapter).into(),
    ];
    env.call_method(listener, jni_str!("onEnd"), jni_sig!("(ZJDDDDJLjava/lang/String;)V"), &args)?;
    Ok(())
}
