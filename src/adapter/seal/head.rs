//! What a sealed file begins with, see the table in `mod.rs`.

use super::TAG;
use crate::checksum;
use crate::error::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

pub(super) const MAGIC: &[u8; 8] = b"PLSEALED";
const LAYOUT: u32 = 1;
/// Bytes of a nonce that are random.
pub(super) const RANDOM: usize = 19;
/// The most bytes of a manifest: some thousand parts.
const MOST: usize = 1 << 20;
/// Bytes before the manifest, and those of them that come before the tag.
const FIXED: usize = TAG_AT + TAG + 8;
const TAG_AT: usize = 16 + RANDOM;

/// What the file says of itself. It is not secret.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub version: u64,
    pub base: String,
    pub parts: Vec<Part>,
    /// The public key, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// A file of the folder.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    pub name: String,
    pub bytes: u64,
}

pub(super) struct Head {
    pub random: [u8; RANDOM],
    /// The tag of nothing, and what it covers.
    pub tag: [u8; TAG],
    pub authenticated: Vec<u8>,
    pub manifest: Manifest,
    /// Bytes of all of it.
    pub length: usize,
}

impl Head {
    pub fn write(manifest: &Manifest, random: [u8; RANDOM], tag: impl FnOnce(&[u8]) -> [u8; TAG]) -> Vec<u8> {
        let text = serde_json::to_vec(manifest).expect("plain data serializes");
        let mut out = [&MAGIC[..], &LAYOUT.to_le_bytes(), &(text.len() as u32).to_le_bytes(), &random].concat();
        let tag = tag(&[&out[..], &text].concat());
        out.extend_from_slice(&tag);
        let sum = checksum::add(checksum::add(0, &out), &text);
        out.extend_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(&text);
        out
    }

    /// # Errors
    /// With the code `Format`, or `Unsupported` for a layout of later versions. Nothing is believed yet.
    pub fn read(bytes: &[u8], name: &Path) -> Result<Self> {
        if !bytes.starts_with(MAGIC) {
            if !bytes.is_empty() && MAGIC.starts_with(bytes) {
                return Err(cut(name));
            }
            let next = "give a file that `pocketlora seal` wrote";
            let message = format!("expected a sealed adapter, got another file, or a changed one; {next}");
            return Err(Error::new(ErrorCode::Format, format!("`{}`", name.display()), message));
        }
        let Some(fixed) = bytes.first_chunk::<FIXED>() else { return Err(cut(name)) };
        let number = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("four bytes"));
        if number(8) != LAYOUT {
            let what = format!("layout {} of sealed adapters", number(8));
            return Err(Error::unsupported(name, what, "update Pocketlora, or fetch the file again"));
        }
        let size = number(12) as usize;
        if size > MOST {
            return Err(changed(name, "its manifest has no such size"));
        }
        let Some(text) = bytes.get(FIXED..FIXED + size) else { return Err(cut(name)) };
        let sum = u64::from_le_bytes(fixed[TAG_AT + TAG..].try_into().expect("eight bytes"));
        if checksum::add(checksum::add(0, &fixed[..TAG_AT + TAG]), text) != sum {
            return Err(changed(name, "its sum is another"));
        }
        let manifest = serde_json::from_slice(text)
            .map_err(|e| Error::format(name, "manifest", "a JSON object of this version", &e).caused_by(e))?;
        Ok(Self {
            random: fixed[16..TAG_AT].try_into().expect("as many"),
            tag: fixed[TAG_AT..TAG_AT + TAG].try_into().expect("as many"),
            authenticated: [&fixed[..TAG_AT], text].concat(),
            manifest,
            length: FIXED + size,
        })
    }
}

/// The error for a file that ends too early.
pub(super) fn cut(name: &Path) -> Error {
    let message = "expected a whole sealed adapter, got one that is cut; fetch it again";
    Error::new(ErrorCode::Format, format!("`{}`", name.display()), message)
}

/// The error for a file that is not what was sealed, as `how` tells.
pub(super) fn changed(name: &Path, how: &str) -> Error {
    let message = format!("expected the bytes that were sealed, got changed ones: {how}; fetch it again");
    Error::new(ErrorCode::Format, format!("`{}`", name.display()), message)
}
