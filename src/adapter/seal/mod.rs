//! Sealed adapters: an adapter's folder in one encrypted file, for one base, in a version that counts up.
//!
//! The host gives a key of 32 bytes, as its keystore holds them. A seal is opened into memory only. It keeps what an adapter
//! is taught from whoever copies the file, and tells every change of it; it does not keep the opened adapter from whoever
//! reads the memory of the process. `NAME.sealed` is, with numbers in little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `PLSEALED` |
//! | 4 | version of this layout, 1 |
//! | 4 | M, bytes of the manifest |
//! | 19 | random part of all nonces |
//! | 16 | tag of an empty text; its further data are all bytes before it, and the manifest |
//! | 8 | sum of all bytes before it, and of the manifest: tells damage from a wrong key, and protects from nothing |
//! | M | manifest, a JSON object: `version`, `base`, `parts` (names and bytes), `signer` if it is signed |
//! | 64 | only if it is signed: Ed25519 over [`SIGNED`] and the SHA-256 of all other bytes of the file |
//! | rest | the parts end to end, in pieces of 64 KiB, the last one of 1 to 65,536 bytes, each with its tag of 16 behind it |
//!
//! Everything is encrypted by XChaCha20-Poly1305 with nonces of the random part, a counter of 4 bytes (big-endian) and one
//! byte that is 1 for the last piece, as STREAM has it (Hoang et al. 2015): pieces that are moved, left out or cut off fail.
//! The empty text has the counter's largest value and 2. The manifest is not secret: it tells names and sizes of parts.

mod head;
mod keys;
#[cfg(test)]
mod tests;

pub use keys::{Key, hex};

use super::{AdapterFile, CENTROID, LESSONS, Parts};
use crate::error::{Error, ErrorCode, Result};
use bytes::Bytes;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::{AeadInOut as _, KeyInit as _, Tag, XChaCha20Poly1305, XNonce};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use head::{Head, Manifest, Part};
use sha2::{Digest as _, Sha256};
use std::path::{Component, Path};
use zeroize::Zeroizing;

/// How the names of sealed adapters end.
pub const SEALED: &str = "sealed";
/// What a signature's text begins with, so that it is of nothing else.
pub const SIGNED: &[u8] = b"pocketlora sealed adapter 1\n";

const TAG: usize = 16;
const SIGNATURE: usize = 64;
const PIECE: usize = 64 << 10;

/// How an adapter is sealed.
pub struct Sealing<'a> {
    /// Who has it can open the seal.
    pub key: &'a Key,
    /// The content hash of the base that it is for, see [`Engine::content_hash`](crate::Engine::content_hash).
    pub base: &'a str,
    /// Its version; a host that has seen one can refuse older ones.
    pub version: u64,
    /// The secret key of who signs it.
    pub signer: Option<&'a Key>,
}

/// How a seal is opened.
pub struct Opening<'a> {
    /// What it was sealed with.
    pub key: &'a Key,
    /// The content hash of the base at hand; none takes the seal for any base.
    pub base: Option<&'a str>,
    /// The least version that is taken.
    pub least_version: u64,
    /// The public key of who must have signed it; none takes what is signed by anybody, or not at all.
    pub signer: Option<[u8; 32]>,
}

/// What a seal held.
pub struct Sealed {
    /// Its version.
    pub version: u64,
    /// The content hash of the base that it is for.
    pub base: String,
    /// The public key of who signed it.
    pub signer: Option<[u8; 32]>,
    /// The files of the adapter's folder. Their bytes are wiped when the last user is gone.
    pub parts: Parts,
}

/// The files of the PEFT adapter in the folder `dir` that a seal takes: it, what lies beside it, its centroid and what it was
/// taught before, but neither the log of its training nor a tokenizer.
///
/// # Errors
/// It is no adapter in PEFT's form, or is broken.
pub fn parts_of(dir: &Path) -> Result<Parts> {
    AdapterFile::open(dir)?;
    if !AdapterFile::exists(dir) {
        let next = "export it with `pocketlora export --to peft`, and seal that folder";
        return Err(Error::unsupported(dir, "sealing an adapter that is not in PEFT's form", next));
    }
    let mut names: Vec<String> = [CENTROID, LESSONS].map(str::to_owned).into();
    names.extend(super::beside::files(dir)?);
    let mut parts = Parts::new();
    for name in names {
        let path = dir.join(&name);
        match std::fs::read(&path) {
            Ok(bytes) => drop(parts.insert(name, bytes.into())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("read", &path, e)),
        }
    }
    Ok(parts)
}

/// Whether the file at `path` begins as a sealed adapter.
#[must_use]
pub fn is_sealed(path: &Path) -> bool {
    let mut start = [0; 8];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
    read.is_ok() && start == *head::MAGIC
}

/// `parts` as the bytes of a sealed file.
///
/// # Errors
/// There is nothing in them or too much for a file, a name leads out of the folder, or the system gives no random numbers.
pub fn seal(parts: &Parts, how: &Sealing<'_>) -> Result<Vec<u8>> {
    let part = |(name, bytes): (&String, &Bytes)| Part { name: name.clone(), bytes: bytes.len() as u64 };
    let signer = how.signer.map(|key| SigningKey::from_bytes(key.bytes()));
    let manifest = Manifest {
        version: how.version,
        base: how.base.to_owned(),
        parts: parts.iter().map(part).collect(),
        signer: signer.as_ref().map(|key| hex(&key.verifying_key().to_bytes())),
    };
    let total = total_of(&manifest).ok_or_else(|| {
        Error::config("parts", "files with bytes in them, below the folder", "other names, or too many")
    })?;
    let mut random = [0; head::RANDOM];
    getrandom::fill(&mut random)
        .map_err(|e| Error::new(ErrorCode::Io, "random numbers", "the system gives none").caused_by(e))?;
    let cipher = Cipher::new(how.key, random);
    let mut out = Head::write(&manifest, random, |data| cipher.tag_of_nothing(data));
    let signed_at = out.len();
    out.resize(signed_at + if signer.is_some() { SIGNATURE } else { 0 }, 0);
    let mut plain = Zeroizing::new(Vec::with_capacity(total));
    parts.values().for_each(|bytes| plain.extend_from_slice(bytes));
    let last = plain.len().div_ceil(PIECE) - 1;
    for (number, piece) in plain.chunks_mut(PIECE).enumerate() {
        let tag =
            cipher.0.encrypt_inout_detached(&cipher.nonce(number as u32, (number == last).into()), &[], piece.into());
        out.extend_from_slice(piece);
        out.extend_from_slice(&tag.expect("a piece is far below what one nonce can encrypt"));
    }
    if let Some(signer) = signer {
        let signature = signer.sign(&signed(&out, signed_at));
        out[signed_at..signed_at + SIGNATURE].copy_from_slice(&signature.to_bytes());
    }
    Ok(out)
}

/// Opens the sealed file `bytes`, which is called `name` in messages. What it holds stands in memory only.
///
/// # Errors
/// With the code `Format`: it is no seal, is cut, or a byte of it was changed. With `Key`: it was sealed with another key, or
/// is not signed by `signer`. With `AdapterMismatch`: it is for another base. With `Outdated`: its version is below the least.
pub fn open(bytes: &[u8], name: &Path, how: &Opening<'_>) -> Result<Sealed> {
    let place = format!("`{}`", name.display());
    let failed = |code, message: String| Error::new(code, place.clone(), message);
    let head = Head::read(bytes, name)?;
    let cipher = Cipher::new(how.key, head.random);
    if cipher.tag_of_nothing(&head.authenticated) != head.tag {
        let message = "expected the key that it was sealed with, got another; give that key, or seal the adapter again";
        return Err(failed(ErrorCode::Key, message.to_owned()));
    }
    let manifest = &head.manifest;
    let total = total_of(manifest)
        .ok_or_else(|| Error::format(name, "manifest", "sizes and names of parts below a folder", "others"))?;
    let signer = manifest.signer.as_deref().map(|text| Key::parse(text.as_bytes(), name)).transpose()?;
    let body = head.length + if signer.is_some() { SIGNATURE } else { 0 };
    let expected = total.checked_add(total.div_ceil(PIECE) * TAG).and_then(|size| size.checked_add(body));
    match expected.map(|expected| bytes.len().cmp(&expected)) {
        Some(std::cmp::Ordering::Equal) => {}
        Some(std::cmp::Ordering::Greater) => {
            return Err(head::changed(name, "there are bytes behind its end"));
        }
        _ => return Err(head::cut(name)),
    }
    let signer = signer.map(|key| *key.bytes());
    if let Some(public) = &signer {
        let signature = Signature::from_bytes(bytes[head.length..body].try_into().expect("as long as a signature"));
        let public = VerifyingKey::from_bytes(public);
        let sound = public.is_ok_and(|key| key.verify_strict(&signed(bytes, head.length), &signature).is_ok());
        if !sound {
            return Err(head::changed(name, "its signature is of other bytes"));
        }
    }
    if let Some(wanted) = how.signer.filter(|wanted| signer != Some(*wanted)) {
        let got = signer.map_or_else(|| "none".to_owned(), |signer| format!("that of `{}`", hex(&signer)));
        let message = format!("expected a signature of `{}`, got {got}; ask its maker for it", hex(&wanted));
        return Err(failed(ErrorCode::Key, message));
    }
    if manifest.version < how.least_version {
        let (least, got) = (how.least_version, manifest.version);
        let message = format!("expected version {least} or a later one, got version {got}; fetch the newer adapter");
        return Err(failed(ErrorCode::Outdated, message));
    }
    if let Some(base) = how.base.filter(|base| *base != manifest.base) {
        let message = format!(
            "expected an adapter that was sealed for this base (content hash `{base}`), got one for `{}`; use it with \
             that base",
            manifest.base
        );
        return Err(failed(ErrorCode::AdapterMismatch, message));
    }
    let mut plain = Zeroizing::new(vec![0; total]);
    let last = total.div_ceil(PIECE) - 1;
    for (number, (piece, out)) in bytes[body..].chunks(PIECE + TAG).zip(plain.chunks_mut(PIECE)).enumerate() {
        let (text, tag) = piece.split_at(out.len());
        let (nonce, tag) =
            (cipher.nonce(number as u32, (number == last).into()), Tag::try_from(tag).expect("16 bytes"));
        let buffer = InOutBuf::new(text, out).expect("of one length");
        if cipher.0.decrypt_inout_detached(&nonce, &[], buffer, &tag).is_err() {
            return Err(head::changed(name, &format!("piece {number} is not what was sealed")));
        }
    }
    let mut rest = Bytes::from_owner(plain);
    let parts = manifest.parts.iter().map(|part| (part.name.clone(), rest.split_to(part.bytes as usize))).collect();
    Ok(Sealed { version: manifest.version, base: manifest.base.clone(), signer, parts })
}

impl Sealed {
    /// Its adapter, called `name` in messages.
    ///
    /// # Errors
    /// As [`AdapterFile::open`].
    pub fn adapter(self, name: &Path) -> Result<AdapterFile> {
        AdapterFile::from_parts(self.parts, name)
    }
}

/// Bytes of all parts together. None where they are none, too many for a counter of 4 bytes, or have names that lead out of
/// a folder.
fn total_of(manifest: &Manifest) -> Option<usize> {
    let below = |name: &str| {
        !name.is_empty()
            && !name.contains('\\')
            && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
    };
    let total = manifest.parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.bytes))?;
    let fits = total > 0 && total.div_ceil(PIECE as u64) < u64::from(u32::MAX);
    (fits && manifest.parts.iter().all(|part| below(&part.name))).then(|| usize::try_from(total).ok())?
}

/// What is signed of a file whose signature stands at `at`.
fn signed(bytes: &[u8], at: usize) -> Vec<u8> {
    let digest = Sha256::new().chain_update(&bytes[..at]).chain_update(&bytes[at + SIGNATURE..]).finalize();
    [SIGNED, &digest].concat()
}

/// A key, and the random part of the nonces that it is used with.
struct Cipher(XChaCha20Poly1305, [u8; head::RANDOM]);

impl Cipher {
    fn new(key: &Key, random: [u8; head::RANDOM]) -> Self {
        Self(XChaCha20Poly1305::new(key.bytes().into()), random)
    }

    fn nonce(&self, number: u32, last: u8) -> XNonce {
        let mut nonce = XNonce::default();
        nonce[..head::RANDOM].copy_from_slice(&self.1);
        nonce[head::RANDOM..head::RANDOM + 4].copy_from_slice(&number.to_be_bytes());
        nonce[head::RANDOM + 4] = last;
        nonce
    }

    /// The tag of an empty text with `data` beside it.
    fn tag_of_nothing(&self, data: &[u8]) -> [u8; TAG] {
        let tag = self.0.encrypt_inout_detached(&self.nonce(u32::MAX, 2), data, InOutBuf::from(&mut [][..]));
        tag.expect("the manifest is far below what one tag can cover").into()
    }
}
