//! Sealing adapters for this base, and opening them on it.

use super::Engine;
use crate::adapter::seal::{self, Key, Opening, Sealing};
use crate::adapter::{AdapterFile, mark};
use crate::error::{Error, ErrorCode, Result};
use std::path::Path;

impl Engine {
    /// A hash of the base's content, by which seals know it. It reads some blocks of all layers.
    ///
    /// # Errors
    /// The model has no layers that it covers; out of memory.
    pub fn content_hash(&self) -> Result<String> {
        let hash = mark::content_of(self.base())?;
        hash.ok_or_else(|| Error::unsupported(self.dir(), "a content hash of such a model", "use another model"))
    }

    /// The adapter in the folder `dir` as the bytes of a sealed file, for this base alone.
    ///
    /// # Errors
    /// It is of another base, as far as it tells; it is not in PEFT's form, is broken, or brings a tokenizer or a template of
    /// its own, which a seal does not hold.
    pub fn seal(&self, dir: &Path, key: &Key, version: u64, signer: Option<&Key>) -> Result<Vec<u8>> {
        let parts = seal::parts_of(dir)?;
        let file = AdapterFile::open(dir)?;
        let refused = |code, message: String| Err(Error::new(code, format!("`{}`", dir.display()), message));
        mark::check(self.base(), &file)?;
        if let Some(doubt) = mark::doubt(self.base(), &file)? {
            let message = format!("expected an adapter of this base, got another's: {doubt}; give that base with `-m`");
            return refused(ErrorCode::AdapterMismatch, message);
        }
        if let Some(own) = self.own(&file)? {
            let message = format!(
                "expected an adapter that is used with the text of its base, got one with its own {}, which a seal does \
                 not hold; merge it into the base",
                own.names()
            );
            return refused(ErrorCode::Unsupported, message);
        }
        seal::seal(&parts, &Sealing { key, base: &self.content_hash()?, version, signer })
    }

    /// The adapter in the sealed file `bytes`, which is called `name` in messages. It is opened into memory alone, and goes
    /// to [`Engine::attach_file`].
    ///
    /// # Errors
    /// As [`seal::open`]; its adapter is broken.
    pub fn unseal(
        &self,
        bytes: &[u8],
        name: &Path,
        key: &Key,
        least_version: u64,
        signer: Option<[u8; 32]>,
    ) -> Result<AdapterFile> {
        let base = self.content_hash()?;
        seal::open(bytes, name, &Opening { key, base: Some(&base), least_version, signer })?.adapter(name)
    }
}
