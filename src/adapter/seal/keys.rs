//! Keys of 32 bytes, wiped when they are dropped.

use crate::error::{Error, ErrorCode, Result};
use std::fmt::{self, Write as _};
use std::path::Path;
use zeroize::{Zeroize as _, Zeroizing};

/// A secret of 32 bytes: a key of seals, or the secret part of one that signs.
pub struct Key(Zeroizing<[u8; 32]>);

impl Key {
    /// The key that `bytes` are. They stay where they are: wiping them is up to the caller.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self(Zeroizing::new(*bytes))
    }

    /// A key of 32 bytes as they are, or of 64 hexadecimal digits, with white space around them or not. `name` is where it
    /// comes from.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(bytes: &[u8], name: &Path) -> Result<Self> {
        if let Ok(raw) = bytes.try_into() {
            return Ok(Self::new(raw));
        }
        let (digits, mut key) = (bytes.trim_ascii(), Zeroizing::new([0; 32]));
        let value = |digit: u8| char::from(digit).to_digit(16);
        let pairs = digits.chunks(2).map(|pair| Some((value(pair[0])? << 4 | value(*pair.get(1)?)?) as u8));
        if digits.len() != 64 || pairs.zip(key.iter_mut()).any(|(from, to)| from.map(|from| *to = from).is_none()) {
            let message = "expected a key of 32 bytes or 64 hexadecimal digits, got something else; make one by `openssl \
                           rand -hex 32`";
            return Err(Error::new(ErrorCode::Key, format!("`{}`", name.display()), message));
        }
        Ok(Self(key))
    }

    /// Reads a key from a file, see [`Key::parse`].
    ///
    /// # Errors
    /// As there; the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let mut bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let key = Self::parse(&bytes, path);
        bytes.zeroize();
        key
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public part of a key that signs.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        ed25519_dalek::SigningKey::from_bytes(&self.0).verifying_key().to_bytes()
    }
}

impl fmt::Debug for Key {
    /// Not its bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// `bytes` as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
