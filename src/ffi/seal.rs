//! Sealed adapters: encrypted, for one model, in versions that count up.

use super::engine::EngineBox;
use super::{Buffer, Failure, Held, Out, Str, guarded};
use crate::error::Result;
use std::path::Path;

#[cfg(feature = "seal")]
mod keyed {
    use super::{EngineBox, Path, Result, Str};
    use crate::adapter::AdapterFile;
    use crate::adapter::seal::Key;
    use crate::error::Error;

    /// 32 bytes that C handed in as `name`; none if there are none.
    unsafe fn bytes(text: Str, name: &str) -> Result<Option<[u8; 32]>> {
        // SAFETY: the header's rule for texts.
        let bytes = unsafe { text.bytes(name) }?;
        let wrong = |_| Error::config(name, "32 bytes", format!("{} bytes", bytes.len()));
        if bytes.is_empty() { Ok(None) } else { bytes.try_into().map(Some).map_err(wrong) }
    }

    unsafe fn key(text: Str) -> Result<Key> {
        // SAFETY: the header's rule for texts.
        let bytes = unsafe { bytes(text, "key") }?;
        bytes.map(|bytes| Key::new(&bytes)).ok_or_else(|| Error::config("key", "32 bytes", "none"))
    }

    pub unsafe fn seal(engine: &EngineBox, dir: &Path, secret: Str, version: u64, signer: Str) -> Result<Vec<u8>> {
        // SAFETY: the header's rule for texts.
        let (key, signer) = unsafe { (key(secret)?, bytes(signer, "signer")?) };
        engine.0.seal(dir, &key, version, signer.map(|bytes| Key::new(&bytes)).as_ref())
    }

    pub unsafe fn unseal(
        engine: &EngineBox,
        sealed: &[u8],
        name: &Path,
        secret: Str,
        least_version: u64,
        signer: Str,
    ) -> Result<AdapterFile> {
        // SAFETY: the header's rule for texts.
        let (key, signer) = unsafe { (key(secret)?, bytes(signer, "signer")?) };
        engine.0.unseal(sealed, name, &key, least_version, signer)
    }
}

#[cfg(not(feature = "seal"))]
mod keyed {
    use super::{EngineBox, Path, Result, Str};
    use crate::adapter::AdapterFile;
    use crate::error::Error;

    fn left_out<T>(name: &Path) -> Result<T> {
        Err(Error::unsupported(
            name,
            "sealing, which this library was built without,",
            "build it with the feature `seal`",
        ))
    }

    pub unsafe fn seal(_: &EngineBox, dir: &Path, _: Str, _: u64, _: Str) -> Result<Vec<u8>> {
        left_out(dir)
    }

    pub unsafe fn unseal(_: &EngineBox, _: &[u8], name: &Path, _: Str, _: u64, _: Str) -> Result<AdapterFile> {
        left_out(name)
    }
}

/// Seals the adapter in the folder `adapter` for this model: `sealed` becomes the bytes of a file that only `key` opens, 32
/// bytes from the system's keystore. `version` counts up, so that an app can refuse what is older than what it had. `signer`
/// is empty, or the 32 bytes of a secret Ed25519 key.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapter_seal(
    engine: *const EngineBox,
    adapter: Str,
    key: Str,
    version: u64,
    signer: Str,
    sealed: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(sealed, "sealed")?);
        // SAFETY: the header's rules for texts and places of results.
        unsafe {
            let made = keyed::seal(&engine, &adapter.needed_path("adapter")?, key, version, signer)?;
            place.set(Buffer(made).hold());
        }
        Ok(())
    })
}

/// As `pl_adapter_attach`, for a sealed adapter, which is opened into memory alone. A changed byte, another key, another
/// model, a version below `least_version`, and a signature that is not of the public key `signer` (empty takes any) are
/// refused, each by its code. Messages and lists call it `name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_adapter_attach_sealed(
    engine: *const EngineBox,
    sealed: Str,
    name: Str,
    key: Str,
    least_version: u64,
    signer: Str,
    scale: f32,
    number: *mut u64,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(number, "number")?);
        // SAFETY: the header's rules for texts and places of results.
        unsafe {
            let (bytes, name) = (sealed.bytes("sealed")?, name.needed_path("name")?);
            let file = keyed::unseal(&engine, bytes, &name, key, least_version, signer)?;
            place.set(engine.0.attach_file(file, scale)?.number());
        }
        Ok(())
    })
}
