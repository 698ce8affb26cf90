//! Adapters of an open model.

use super::engine::EngineBox;
use super::{Buffer, Failure, Held, Out, Str, guarded, list};
use crate::adapter::AdapterFile;
use crate::engine::AdapterId;
use crate::error::{Error, ErrorCode, Result};
use bytes::Bytes;
use serde_json::json;

/// The attached adapter that has `number`.
fn id(engine: &EngineBox, number: u64) -> Result<AdapterId> {
    let found = engine.0.attached().into_iter().map(|attached| attached.id).find(|id| id.number() == number);
    found.ok_or_else(|| {
        let message = "expected an attached adapter, got one that is not, or no more; attach it, or choose another";
        Error::new(ErrorCode::Config, format!("adapter {number}"), message)
    })
}

/// Those that have `numbers`.
pub(super) fn ids(engine: &EngineBox, numbers: &[u64]) -> Result<Vec<AdapterId>> {
    numbers.iter().map(|number| id(engine, *number)).collect()
}

/// Adds the PEFT adapter in the folder `adapter`, its effect multiplied by `scale` (1 for as it was trained). Chats that did
/// not choose adapters use it from their next answer on. `number` becomes what it is called by.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapter_attach(
    engine: *const EngineBox,
    adapter: Str,
    scale: f32,
    number: *mut u64,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(number, "number")?);
        // SAFETY: the header's rules for texts and places of results.
        unsafe {
            let id = engine.0.attach(&adapter.needed_path("adapter")?, scale)?;
            place.set(id.number());
        }
        Ok(())
    })
}

/// As `pl_adapter_attach`, for an adapter that the app holds in memory: the bytes of its `adapter_config.json` and of its
/// `adapter_model.safetensors`, which are copied. Messages and lists call it `name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapter_attach_bytes(
    engine: *const EngineBox,
    config: Str,
    tensors: Str,
    name: Str,
    scale: f32,
    number: *mut u64,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(number, "number")?);
        // SAFETY: the header's rules for texts and places of results.
        unsafe {
            let tensors = Bytes::copy_from_slice(tensors.bytes("tensors")?);
            let file = AdapterFile::from_bytes(config.bytes("config")?, tensors, name.needed_path("name")?)?;
            place.set(engine.0.attach_file(file, scale)?.number());
        }
        Ok(())
    })
}

/// Multiplies the effects of `count` attached adapters by `scales`, all at once, well within a millisecond.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapters_scale(
    engine: *const EngineBox,
    numbers: *const u64,
    scales: *const f32,
    count: usize,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let engine = EngineBox::of(engine)?;
        // SAFETY: the header's rule for lists.
        let (numbers, scales) = unsafe { (list(numbers, count, "numbers")?, list(scales, count, "scales")?) };
        let pairs: Vec<_> = ids(&engine, numbers)?.into_iter().zip(scales.iter().copied()).collect();
        engine.0.set_scales(&pairs)
    })
}

/// Removes an adapter. Answers that are being given use it to their end.
#[unsafe(no_mangle)]
pub extern "C" fn pl_adapter_detach(engine: *const EngineBox, number: u64, error: *mut *mut Failure) -> u32 {
    guarded(error, || {
        let engine = EngineBox::of(engine)?;
        engine.0.detach(id(&engine, number)?)
    })
}

/// Tells which adapters are attached: a list in JSON of objects with `number`, `folder`, `scale` and `warnings`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapters_list(
    engine: *const EngineBox,
    json: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(json, "json")?);
        let attached = engine.0.attached();
        let all: Vec<_> = attached
            .iter()
            .map(|one| {
                json!({"number": one.id.number(), "folder": one.dir, "scale": one.scale, "warnings": one.warnings})
            })
            .collect();
        let text = serde_json::to_vec(&all).unwrap_or_default();
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(Buffer(text).hold()) }
        Ok(())
    })
}
