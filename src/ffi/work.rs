//! Work on files, and what stops work.

use super::engine::EngineBox;
use super::{Failure, Held, Out, Str, guarded, handle, held, sized};
use crate::adapter::{AdapterFile, Merged};
use crate::engine::Cancel;
use crate::error::{Error, Result};
use crate::eval::score_data;
use crate::format::{Existing, Progress, Target, open_source, quantize};
use std::ffi::c_void;
use std::ops::ControlFlow;

/// A wish to stop, which any thread may have. One may stop several calls.
pub struct CancelBox(Cancel);
held!(CancelBox, "cancel");

impl CancelBox {
    /// The wish that C handed in, or one that nobody has.
    ///
    /// # Errors
    /// The handle is none.
    pub(super) fn wish(cancel: *const Self) -> Result<Cancel> {
        if cancel.is_null() { Ok(Cancel::new()) } else { Self::of(cancel).map(|cancel| cancel.0.clone()) }
    }
}

/// Makes a wish to stop that nobody has yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_cancel_new(cancel: *mut *mut CancelBox, error: *mut *mut Failure) -> u32 {
    guarded(error, || {
        let place = Out::new(cancel, "cancel")?;
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(CancelBox(Cancel::new()).hold()) }
        Ok(())
    })
}

/// Stops (`wish` 1) the calls that it was given to, those at work within a layer's time and later ones at once; 0 takes the
/// wish back. May be called from any thread.
#[unsafe(no_mangle)]
pub extern "C" fn pl_cancel_set(cancel: *const CancelBox, wish: u32, error: *mut *mut Failure) -> u32 {
    guarded(error, || {
        let cancel = CancelBox::of(cancel)?;
        if wish == 0 {
            cancel.0.reset()
        } else {
            cancel.0.cancel()
        }
        Ok(())
    })
}

/// Frees it; calls that it was given to go on.
#[unsafe(no_mangle)]
pub extern "C" fn pl_cancel_free(cancel: *mut CancelBox) {
    handle::free(cancel);
}

/// Who hears how far work has come. The function may be null.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WorkListener {
    /// `sizeof(pl_work_listener)`.
    pub size: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// Given to the function.
    pub user: *mut c_void,
    /// So much of `all` is done; 0 goes on, anything else stops the work, which then leaves nothing behind.
    pub on_progress: Option<extern "C" fn(user: *mut c_void, done: u64, all: u64) -> u32>,
}
// SAFETY: addresses and a function, of which any that C hands in are values, behind a size.
unsafe impl sized::Sized for WorkListener {}

const NO_LISTENER: WorkListener =
    WorkListener { size: size_of::<WorkListener>() as u32, reserved: 0, user: std::ptr::null_mut(), on_progress: None };

impl WorkListener {
    fn hear(&self, done: u64, all: u64) -> ControlFlow<()> {
        match self.on_progress.map_or(0, |hear| hear(self.user, done, all)) {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// The types that weights can be written in.
fn target(number: u32) -> Result<Target> {
    Ok(match number {
        0 => Target::Nf4,
        1 => Target::F16,
        2 => Target::BF16,
        3 => Target::F32,
        other => return Err(Error::config("to", "0 (NF4), 1 (float16), 2 (bfloat16) or 3 (float32)", other)),
    })
}

/// Makes of the model `source`, a GGUF file or a folder in 16 bits, a folder `out` with the weights in NF4, as
/// `pl_engine_open` takes it. What lies at `out` is not replaced; an unfinished one never has that name, and what a kill leaves
/// beside it under a hidden name goes with the next import to that place. `listener` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_model_import(
    source: Str,
    out: Str,
    listener: *const WorkListener,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        // SAFETY: the header's rules for texts and structs.
        let (path, out, listener) = unsafe {
            let listener = sized::read(listener, NO_LISTENER, "pl_work_listener")?;
            (source.needed_path("source")?, out.needed_path("out")?, listener)
        };
        let source = open_source(&path)?;
        crate::check_import(source.as_ref(), &path)?;
        let hear = &mut |p: Progress<'_>| listener.hear(p.done, p.total);
        quantize(source.as_ref(), &out, Target::Nf4, Existing::Keep, hear).map(drop)
    })
}

/// Writes the folder `out`: the model `model` with the effect of the adapter `adapter`, multiplied by `scale`, in its weights.
/// `to` is their type: 0 NF4, 1 float16, 2 bfloat16, 3 float32. `listener` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_merge(
    model: Str,
    adapter: Str,
    scale: f32,
    to: u32,
    out: Str,
    listener: *const WorkListener,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        // SAFETY: the header's rules for texts and structs.
        let (model, adapter, out, listener) = unsafe {
            let listener = sized::read(listener, NO_LISTENER, "pl_work_listener")?;
            let (model, adapter) = (model.needed_path("model")?, adapter.needed_path("adapter")?);
            (model, adapter, out.needed_path("out")?, listener)
        };
        let to = target(to)?;
        let files: Vec<_> = AdapterFile::open(&adapter)?.each().into_iter().map(|file| (file, scale)).collect();
        let merged = Merged::new(open_source(&model)?, &model, &files)?;
        let hear = &mut |p: Progress<'_>| listener.hear(p.done, p.total);
        merged.write(&out, to, Existing::Keep, hear).map(drop)
    })
}

/// How well a model answers data.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Evaluated {
    /// `sizeof(pl_evaluation)`, set by the caller.
    pub size: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// Tokens that were scored.
    pub tokens: u64,
    /// Mean loss of a token (natural log).
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for Evaluated {}

/// Scores the answers in `data`, a file or folder as training takes it, by the model with its attached adapters. `listener`
/// (or null) hears of tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_evaluate(
    engine: *const EngineBox,
    data: Str,
    listener: *const WorkListener,
    evaluation: *mut Evaluated,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let engine = EngineBox::of(engine)?;
        // SAFETY: the header's rules for texts, structs and places of results.
        let (path, listener) = unsafe {
            sized::check_place(evaluation, "pl_evaluation")?;
            (data.needed_path("data")?, sized::read(listener, NO_LISTENER, "pl_work_listener")?)
        };
        let data = engine.0.held_out_dataset(&path, engine.0.context_tokens())?;
        let (all, mut done) = (data.tokens() as u64, 0);
        let score = score_data(&engine.0, &data, &mut |tokens| {
            done += tokens as u64;
            listener.hear(done, all).is_continue()
        })?;
        let value = Evaluated {
            size: 0,
            reserved: 0,
            tokens: score.tokens as u64,
            loss: score.nll(),
            perplexity: score.perplexity(),
        };
        // SAFETY: the header's rule for places of results.
        unsafe { sized::write(evaluation, &value, "pl_evaluation") }
    })
}
