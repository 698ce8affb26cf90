//! Adapters: attached by a file, from memory or sealed, scaled, detached.

use crate::handles::{AdapterHeld, Held, adapter, engine, free, hold};
use crate::{bytes, native, text, texts};
use jni::objects::{JByteArray, JObjectArray, JString};
use pocketlora::adapter::seal::Key;
use pocketlora::{AdapterFile, AdapterId, Engine, Error, ErrorCode, Result};
use std::path::Path;
use std::sync::Arc;

pub fn held(engine: Engine, id: AdapterId) -> i64 {
    hold(Held::Adapter(Arc::new(AdapterHeld { engine, id })))
}

/// A key of 32 bytes.
fn key(bytes: &[u8], name: &str) -> Result<[u8; 32]> {
    let got = bytes.len();
    bytes.try_into().map_err(|_| Error::new(ErrorCode::Key, name, format!("expected 32 bytes, got {got}")))
}

native!(Java_io_pocketlora_Native_attach(env, handle: i64, path: JString<'local>, scale: f32) -> i64 {
    let (engine, path) = (engine(handle)?, text(env, &path)?);
    let id = engine.attach(Path::new(&path), scale)?;
    Ok(held(engine, id))
});

native!(Java_io_pocketlora_Native_attachBytes(
    env, handle: i64, config: JByteArray<'local>, tensors: JByteArray<'local>, name: JString<'local>, scale: f32,
) -> i64 {
    let (engine, config, tensors) = (engine(handle)?, bytes(env, &config)?, bytes(env, &tensors)?);
    let file = AdapterFile::from_bytes(&config, tensors, text(env, &name)?)?;
    let id = engine.attach_file(file, scale)?;
    Ok(held(engine, id))
});

native!(Java_io_pocketlora_Native_attachSealed(
    env, handle: i64, sealed: JByteArray<'local>, name: JString<'local>, secret: JByteArray<'local>, least: i64,
    signer: JByteArray<'local>, scale: f32,
) -> i64 {
    let (engine, sealed, name) = (engine(handle)?, bytes(env, &sealed)?, text(env, &name)?);
    let secret = Key::new(&key(&bytes(env, &secret)?, "key")?);
    let signer = if signer.is_null() { None } else { Some(key(&bytes(env, &signer)?, "signer")?) };
    let file = engine.unseal(&sealed, Path::new(&name), &secret, least.max(0) as u64, signer)?;
    let id = engine.attach_file(file, scale)?;
    Ok(held(engine, id))
});

native!(Java_io_pocketlora_Native_seal(
    env, handle: i64, dir: JString<'local>, secret: JByteArray<'local>, version: i64, signer: JByteArray<'local>,
) -> JByteArray<'local> {
    let (engine, dir) = (engine(handle)?, text(env, &dir)?);
    let secret = Key::new(&key(&bytes(env, &secret)?, "key")?);
    let signer = if signer.is_null() { None } else { Some(Key::new(&key(&bytes(env, &signer)?, "signer")?)) };
    let sealed = engine.seal(Path::new(&dir), &secret, version.max(0) as u64, signer.as_ref())?;
    Ok(env.byte_array_from_slice(&sealed)?)
});

native!(Java_io_pocketlora_Native_adapterScale(_env, handle: i64, scale: f32) -> () {
    let adapter = adapter(handle)?;
    Ok(adapter.engine.set_scales(&[(adapter.id, scale)])?)
});

native!(Java_io_pocketlora_Native_adapterWarnings(env, handle: i64) -> JObjectArray<'local, JString<'local>> {
    let adapter = adapter(handle)?;
    let attached = adapter.engine.attached().into_iter().find(|attached| attached.id == adapter.id);
    texts(env, attached.map(|attached| attached.warnings).unwrap_or_default().into_iter())
});

native!(Java_io_pocketlora_Native_detach(_env, handle: i64) -> () {
    let adapter = adapter(handle)?;
    adapter.engine.detach(adapter.id)?;
    free(handle);
    Ok(())
});
