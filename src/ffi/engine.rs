//! Models: what they will take, opening them, what they are.

use super::{Failure, Held, Out, Str, guarded, handle, held, list, sized};
use crate::engine::{Engine, Estimate, GivenFile, Options, Pooling, Precision};
use crate::error::{Error, Result};
use crate::ffi::work::CancelBox;
use crate::memory::anonymous_bytes;
use crate::train::TrainConfig;
use std::fs::File;
use std::path::Path;

/// An open model, shared by its chats and trainers, which keep it open after it is freed.
pub struct EngineBox(pub(super) Engine);
held!(EngineBox, "model");

/// The flag of `pl_engine_options` for keys and values in 8 bits: half the memory of long texts, at a small cost.
pub const INT8_CACHE: u32 = 1;
/// The flag for work without a tokenizer.
pub const IDS_ONLY: u32 = 2;
/// The flag that refuses adapters of another base, which are warned of otherwise.
pub const STRICT: u32 = 4;

/// How a model is opened. All zero but the size is the usual way.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// `sizeof(pl_engine_options)`.
    pub size: u32,
    /// Threads; 0 measures at first use how many serve best.
    pub threads: u32,
    /// Arithmetic: 0 fast (products in 8 bits), 1 bfloat16, 2 exact (f32).
    pub precision: u32,
    /// `PL_INT8_CACHE`, `PL_IDS_ONLY`, `PL_STRICT`, or'ed.
    pub flags: u32,
    /// Most tokens of one text; 0 is what the model was made for. A chat's memory grows up to it.
    pub context: u64,
    /// Most anonymous bytes that the model with one full chat may take; more is refused before it is opened. 0 allows all.
    pub memory_budget: u64,
    /// A folder for copies that make things faster and can be made again; empty for none.
    pub cache_dir: Str,
    /// What adapters name the model by; empty for its folder.
    pub base_name: Str,
}

const NO_OPTIONS: EngineOptions = EngineOptions {
    size: size_of::<EngineOptions>() as u32,
    threads: 0,
    precision: 0,
    flags: 0,
    context: 0,
    memory_budget: 0,
    cache_dir: Str::NONE,
    base_name: Str::NONE,
};
// SAFETY: plain numbers and texts behind a size.
unsafe impl sized::Sized for EngineOptions {}

/// The options that C handed in.
///
/// # Safety
/// As [`sized::read`] and [`Str::text`].
unsafe fn options(place: *const EngineOptions) -> Result<Options> {
    // SAFETY: as this function's own.
    let given = unsafe { sized::read(place, NO_OPTIONS, "pl_engine_options") }?;
    let precision = match given.precision {
        0 => Precision::Fast,
        1 => Precision::Bf16,
        2 => Precision::Exact,
        other => return Err(Error::config("precision", "0 (fast), 1 (bfloat16) or 2 (exact)", other)),
    };
    if given.flags & !(INT8_CACHE | IDS_ONLY | STRICT) != 0 {
        return Err(Error::config("flags", "`PL_INT8_CACHE`, `PL_IDS_ONLY` and `PL_STRICT`, or'ed", given.flags));
    }
    // SAFETY: as this function's own.
    let (cache, name) = unsafe { (given.cache_dir.path("cache_dir")?, given.base_name.text("base_name")?) };
    let has = |flag| given.flags & flag != 0;
    Ok(Options {
        threads: given.threads as usize,
        precision,
        int8_cache: has(INT8_CACHE),
        context: usize::try_from(given.context).unwrap_or(usize::MAX),
        cache_dir: cache,
        base_name: (!name.is_empty()).then(|| name.to_owned()),
        ids_only: has(IDS_ONLY),
        strict: has(STRICT),
        memory_budget: (given.memory_budget > 0).then_some(given.memory_budget),
        ..Options::default()
    })
}

/// Bytes that a model will take. Mapped ones are clean pages, which the system may drop; anonymous ones count against the
/// app.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EstimateOut {
    /// `sizeof(pl_estimate)`, set by the caller.
    pub size: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of the longest text.
    pub context_tokens: u64,
    /// Mapped.
    pub mapped: u64,
    /// Anonymous, of the open model.
    pub opened: u64,
    /// Anonymous, of each 1,000 tokens of a chat.
    pub per_1000_tokens: u64,
    /// Anonymous, of a chat that fills the context.
    pub full_chat: u64,
    /// Anonymous, of training beside the open model; 0 without settings.
    pub training: u64,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for EstimateOut {}

/// Tells what the model in the folder `model` will take with `options`, and a run of training with the settings `training`
/// (as those of `pl_train_options`; null for no training). No weights are read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_model_estimate(
    model: Str,
    options: *const EngineOptions,
    training: *const Str,
    estimate: *mut EstimateOut,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        // SAFETY: the header's rules for texts, structs and places of results.
        unsafe {
            sized::check_place(estimate, "pl_estimate")?;
            let (dir, options) = (model.needed_path("model")?, self::options(options)?);
            let config = match training.as_ref() {
                Some(settings) => Some(TrainConfig::parse(settings.text("training")?)?),
                None => None,
            };
            let found = Estimate::of(&dir, &options, config.as_ref())?;
            let value = EstimateOut {
                size: 0,
                reserved: 0,
                parameters: found.parameters,
                context_tokens: found.context_tokens,
                mapped: found.mapped,
                opened: found.opened,
                per_1000_tokens: found.per_1000_tokens,
                full_chat: found.full_chat,
                training: found.training,
            };
            sized::write(estimate, &value, "pl_estimate")
        }
    })
}

/// Opens the model in the folder `model`: its weights are mapped. `options` may be null for the usual way. A GGUF file, or a model in 16 bits, is made into such a
/// folder by `pl_model_import`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_engine_open(
    model: Str,
    options: *const EngineOptions,
    engine: *mut *mut EngineBox,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let place = Out::new(engine, "engine")?;
        // SAFETY: the header's rules for texts, structs and places of results.
        unsafe {
            let (dir, options) = (model.needed_path("model")?, self::options(options)?);
            place.set(EngineBox(Engine::open(&dir, &options)?).hold());
        }
        Ok(())
    })
}

/// A file of a model that the app has open, such as an Android asset or a resource of a bundle.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GivenOut {
    /// Its name in the model's folder, such as `config.json`.
    pub name: Str,
    /// The descriptor of what its bytes lie in; it stays the caller's, and may be closed when the call has returned.
    pub descriptor: i32,
    /// Leave it at 0.
    pub reserved: u32,
    /// The first of its bytes.
    pub offset: u64,
    /// How many there are.
    pub length: u64,
}

/// As `pl_engine_open`, for a model in `count` files that are open already. Weights (`.safetensors`) are mapped where they
/// lie; the other files, some megabytes, are copied into a folder in `scratch` that goes when the model is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_engine_open_files(
    files: *const GivenOut,
    count: usize,
    scratch: Str,
    options: *const EngineOptions,
    engine: *mut *mut EngineBox,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let place = Out::new(engine, "engine")?;
        // SAFETY: the header's rules for lists, texts, structs and places of results.
        unsafe {
            let (scratch, options) = (scratch.needed_path("scratch")?, self::options(options)?);
            let one = |file: &GivenOut| {
                let name = file.name.text("name")?.to_owned();
                let (file, offset, len) = (opened(file.descriptor, &name)?, file.offset, file.length);
                Ok(GivenFile { name, file, offset, len })
            };
            let files: Result<Vec<_>> = list(files, count, "files")?.iter().map(one).collect();
            place.set(EngineBox(Engine::open_given(files?, &scratch, &options)?).hold());
        }
        Ok(())
    })
}

/// The file that a descriptor is of, as one of our own.
#[cfg(unix)]
fn opened(descriptor: i32, name: &str) -> Result<File> {
    use std::os::fd::BorrowedFd;
    if descriptor < 0 {
        return Err(Error::config("descriptor", "that of an open file", descriptor));
    }
    // SAFETY: it is not -1, and the system itself says whether it is open: it is only asked for another of the same file.
    let copy = unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned();
    copy.map(File::from).map_err(|e| Error::io("open the descriptor of", Path::new(name), e))
}

/// Elsewhere files have no descriptors.
#[cfg(not(unix))]
fn opened(_: i32, name: &str) -> Result<File> {
    Err(Error::unsupported(Path::new(name), "a file's descriptor on this system", "open the model by its folder"))
}

/// Closes a model, once its chats and trainers are freed, too.
#[unsafe(no_mangle)]
pub extern "C" fn pl_engine_free(engine: *mut EngineBox) {
    handle::free(engine);
}

/// What a model is, and what is in use now.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EngineInfo {
    /// `sizeof(pl_engine_info)`, set by the caller.
    pub size: u32,
    /// Whether it has a chat template.
    pub chats: u32,
    /// Tokens of the longest text.
    pub context_tokens: u64,
    /// Tokens that there are.
    pub vocabulary: u64,
    /// Numbers of a text's vector, see `pl_embed`.
    pub width: u64,
    /// Bytes of weights that are mapped from files.
    pub mapped: u64,
    /// Anonymous bytes of the whole process now; 0 where the system does not tell.
    pub anonymous: u64,
    /// The highest such number at the ends of answers.
    pub peak_anonymous: u64,
    /// Anonymous bytes of each 1,000 tokens of a chat.
    pub per_1000_tokens: u64,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for EngineInfo {}

/// Tells what an open model is, and what it takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_engine_info_of(
    engine: *const EngineBox,
    info: *mut EngineInfo,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let engine = EngineBox::of(engine)?;
        let value = EngineInfo {
            size: 0,
            chats: u32::from(engine.0.text().is_ok_and(|text| text.template.is_own())),
            context_tokens: engine.0.context_tokens() as u64,
            vocabulary: engine.0.vocabulary() as u64,
            width: engine.0.base().model.config().hidden_size as u64,
            mapped: engine.0.mapped_bytes(),
            anonymous: anonymous_bytes().unwrap_or(0),
            peak_anonymous: engine.0.peak_anonymous_bytes().unwrap_or(0),
            per_1000_tokens: engine.0.context_bytes(1000),
        };
        // SAFETY: the header's rule for places of results.
        unsafe { sized::write(info, &value, "pl_engine_info") }
    })
}

/// Makes a vector of length 1 of a text: the states of its tokens after the last layer, their mean (`last` 0) or the last
/// one's (1). `vector` has room for `capacity` floats, the model's width (`pl_engine_info_of`). `cancel` may be null; a
/// call that it stops fails with `PL_CODE_CANCELLED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_embed(
    engine: *const EngineBox,
    text: Str,
    last: u32,
    vector: *mut f32,
    capacity: usize,
    cancel: *const CancelBox,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let engine = EngineBox::of(engine)?;
        Out::new(vector, "vector")?;
        let width = engine.0.base().model.config().hidden_size;
        if capacity < width {
            return Err(Error::config("capacity", format!("room for the model's {width} floats"), capacity));
        }
        let pooling = match last {
            0 => Pooling::Mean,
            1 => Pooling::Last,
            other => return Err(Error::config("last", "0 for the mean of all tokens, or 1 for the last", other)),
        };
        let cancel = CancelBox::wish(cancel)?;
        // SAFETY: the header's rule for texts.
        let made = engine.0.embed(unsafe { text.text("text") }?, pooling, &cancel)?;
        // SAFETY: there is room for `capacity` floats, and that is no less than what was made.
        unsafe { std::ptr::copy_nonoverlapping(made.as_ptr(), vector, made.len()) }
        Ok(())
    })
}
