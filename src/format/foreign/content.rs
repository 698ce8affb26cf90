//! Files by their first bytes.

use crate::error::{Error, ErrorCode};
use std::path::Path;

/// A kind of content that is neither weights nor text of ours.
pub(crate) struct Content {
    /// What people call it, with an article.
    pub name: &'static str,
    /// What to do about it.
    pub next: &'static str,
    code: ErrorCode,
    is: fn(&[u8]) -> bool,
}

impl Content {
    /// The error for the file at `path`, where `wanted` was expected.
    pub(crate) fn error(&self, path: &Path, wanted: &str) -> Error {
        let message = format!("expected {wanted}, got {}; {}", self.name, self.next);
        Error::new(self.code, format!("`{}`", path.display()), message)
    }
}

/// What `bytes`, the beginning of a file or all of it, are; `None` for what is ours or nobody's.
pub(crate) fn content(bytes: &[u8]) -> Option<&'static Content> {
    // The length before a safetensors header may look like anything: 640 bytes begin as a pickle does.
    if looks_like_safetensors(bytes) {
        return None;
    }
    CONTENTS.iter().find(|content| (content.is)(bytes))
}

/// Whether `bytes` begin with the length of a header, and a header in JSON.
pub(crate) fn looks_like_safetensors(bytes: &[u8]) -> bool {
    let length = bytes.first_chunk().map(|length| u64::from_le_bytes(*length));
    bytes.get(8) == Some(&b'{') && length.is_some_and(|length| length < 1 << 32)
}

const AGAIN: &str = "the file was not downloaded to its end: fetch it again";
const SAFETENSORS: &str = "`pocketlora pull OWNER/REPO` fetches a model of the hub as safetensors; weights of your own are \
                           saved so by `model.save_pretrained(DIR, safe_serialization=True)` in transformers";
const UNPACK: &str = "unpack it and give what is in it";
const OTHER_RUNTIME: &str = "use the model's safetensors or GGUF files, which `pocketlora pull OWNER/REPO` fetches";

/// Built by functions rather than literals, so that the table reads as one line a kind.
const fn broken(name: &'static str, next: &'static str, is: fn(&[u8]) -> bool) -> Content {
    Content { name, next, code: ErrorCode::Format, is }
}

const fn foreign(name: &'static str, next: &'static str, is: fn(&[u8]) -> bool) -> Content {
    Content { name, next, code: ErrorCode::Unsupported, is }
}

/// In the order in which they are tried: the special before the general.
const CONTENTS: &[Content] = &[
    broken("an empty file", AGAIN, <[u8]>::is_empty),
    broken("zeros only", AGAIN, |b| b.len() >= 16 && b.iter().take(4096).all(|&x| x == 0)),
    broken(
        "a Git LFS pointer",
        "install Git LFS, then run `git lfs pull` in the repository's folder to fetch the content",
        |b| {
            b.starts_with(b"version https://git-lfs.github.com/")
                || b.starts_with(b"version https://hawser.github.com/")
        },
    ),
    broken("a git-annex pointer", "run `git annex get` on it to fetch the content", |b| {
        b.starts_with(b"/annex/objects/") || b.starts_with(b"../.git/annex/objects/")
    }),
    broken(
        "a web page",
        "what was saved is a page about the file, or a refusal: fetch the file itself, for instance by `pocketlora pull \
         OWNER/REPO` with `HF_TOKEN` set where the model asks for access",
        is_web_page,
    ),
    broken(
        "a server's answer instead of the file",
        "fetch it again with the access that the model asks for: `pocketlora pull OWNER/REPO` reads a token from `HF_TOKEN`",
        |b| ANSWERS.iter().any(|answer| b.len() < 1000 && b.starts_with(answer)),
    ),
    foreign("a PyTorch checkpoint (a zipped pickle)", SAFETENSORS, |b| is_zip(b) && first_entry_ends(b, "data.pkl")),
    foreign("NumPy arrays (`.npz`)", SAFETENSORS, |b| is_zip(b) && first_entry_ends(b, ".npy")),
    foreign("a zip archive", UNPACK, is_zip),
    foreign("a Python pickle", SAFETENSORS, |b| b.len() > 2 && b[0] == 0x80 && (2..=5).contains(&b[1])),
    foreign("a NumPy array (`.npy`)", SAFETENSORS, |b| b.starts_with(b"\x93NUMPY")),
    foreign("an HDF5 file (Keras, TensorFlow)", SAFETENSORS, |b| b.starts_with(b"\x89HDF\r\n\x1a\n")),
    foreign("a gzip archive", UNPACK, |b| b.starts_with(b"\x1f\x8b\x08")),
    foreign("a zstd archive", UNPACK, |b| b.starts_with(b"\x28\xb5\x2f\xfd")),
    foreign("a bzip2 archive", UNPACK, |b| b.starts_with(b"BZh") && b.get(4..7) == Some(b"1AY")),
    foreign("an xz archive", UNPACK, |b| b.starts_with(b"\xfd7zXZ\0")),
    foreign("a 7-Zip archive", UNPACK, |b| b.starts_with(b"7z\xbc\xaf\x27\x1c")),
    foreign("a tar archive", UNPACK, |b| b.get(257..262) == Some(b"ustar")),
    foreign(
        "a ggml file from before GGUF",
        "fetch the model as GGUF, or convert it with llama.cpp's `convert_llama_ggml_to_gguf.py`",
        |b| [&b"lmgg"[..], b"fmgg", b"tjgg", b"algg"].iter().any(|magic| b.starts_with(magic)),
    ),
    foreign("a llamafile", "use the GGUF file that it was made of", |b| {
        b.starts_with(b"MZqFpD") || b.starts_with(b"\x7fELF") || b.starts_with(b"MZ\x90\0")
    }),
    foreign("a TFLite model", OTHER_RUNTIME, |b| b.get(4..8) == Some(b"TFL3")),
    foreign("an ONNX model", OTHER_RUNTIME, is_onnx),
    foreign("a Core ML model", OTHER_RUNTIME, |b| {
        // Protobuf: the specification's version, then the model's description.
        b.len() > 64 && b[0] == 0x08 && (1..=12).contains(&b[1]) && b[2] == 0x12
    }),
    foreign(
        "a Parquet file",
        "if it is training data, `train -d FILE` says how to make JSONL of it; a model is a folder or a GGUF file",
        |b| b.starts_with(b"PAR1"),
    ),
    foreign("an Arrow file", "export it as JSONL with `datasets`: `ds.to_json(\"data.jsonl\")`", |b| {
        b.starts_with(b"ARROW1\0\0")
    }),
    foreign("an SQLite database", "export the table as CSV", |b| b.starts_with(b"SQLite format 3\0")),
    foreign("a PDF document", "export its text", |b| b.starts_with(b"%PDF-")),
    broken("text in UTF-16", "save it again as UTF-8", |b| b.starts_with(b"\xff\xfe") || b.starts_with(b"\xfe\xff")),
];

/// How the texts begin that hubs answer with where there is no file to send.
const ANSWERS: &[&[u8]] = &[
    b"Entry not found",
    b"Repository not found",
    b"Invalid username or password",
    b"Invalid credentials",
    b"Unauthorized",
    b"Forbidden",
    b"Not Found",
    b"404: Not Found",
    b"Access to model",
    b"Access to dataset",
    b"We had to rate limit",
    b"Internal Server Error",
    b"Bad Gateway",
    b"<no such file",
];

fn is_web_page(bytes: &[u8]) -> bool {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    let start = text[..text.len().min(64)].to_ascii_lowercase();
    [&b"<!doctype"[..], b"<html", b"<?xml", b"<head", b"<body", b"<error", b"<!--"].iter().any(|s| start.starts_with(s))
}

fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"PK\x05\x06")
}

/// Whether the name of a zip's first entry ends so: PyTorch puts its pickle first, NumPy has nothing but arrays.
fn first_entry_ends(bytes: &[u8], ending: &str) -> bool {
    let Some(&[low, high]) = bytes.get(26..28).and_then(|b| b.first_chunk()) else { return false };
    let name = bytes.get(30..30 + usize::from(u16::from_le_bytes([low, high])));
    name.is_some_and(|name| name.ends_with(ending.as_bytes()))
}

/// Protobuf: the version of the representation, then the name of the program that wrote it.
fn is_onnx(bytes: &[u8]) -> bool {
    let [0x08, 1..=20, 0x12, len, rest @ ..] = bytes else { return false };
    let producer = rest.get(..usize::from(*len)).unwrap_or_default();
    (1..64).contains(len) && !producer.is_empty() && producer.iter().all(|b| b.is_ascii_graphic() || *b == b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zip(name: &str) -> Vec<u8> {
        let mut bytes = b"PK\x03\x04".to_vec();
        bytes.resize(26, 0);
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(name.as_bytes());
        bytes
    }

    #[test]
    fn contents_are_known_by_their_bytes() {
        let mut tar = vec![b'a'; 300];
        tar[257..262].copy_from_slice(b"ustar");
        let core_ml = [&b"\x08\x04\x12\x7f\x0a\x05input"[..], &[7; 100]].concat();
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("an empty file", vec![]),
            ("zeros only", vec![0; 100]),
            ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n".to_vec()),
            ("a git-annex pointer", b"/annex/objects/SHA256E-s5--00".to_vec()),
            ("a web page", b"\xef\xbb\xbf\n <!DOCTYPE html><html>".to_vec()),
            ("a web page", b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>".to_vec()),
            ("a server's answer instead of the file", b"Entry not found".to_vec()),
            ("a server's answer instead of the file", b"Access to model a/b is restricted.".to_vec()),
            ("a PyTorch checkpoint (a zipped pickle)", zip("archive/data.pkl")),
            ("NumPy arrays (`.npz`)", zip("weights.npy")),
            ("a zip archive", zip("model/")),
            ("a Python pickle", b"\x80\x02\x8a\x0al".to_vec()),
            ("a NumPy array (`.npy`)", b"\x93NUMPY\x01\0".to_vec()),
            ("an HDF5 file (Keras, TensorFlow)", b"\x89HDF\r\n\x1a\n".to_vec()),
            ("a gzip archive", b"\x1f\x8b\x08\0".to_vec()),
            ("a zstd archive", b"\x28\xb5\x2f\xfd\0".to_vec()),
            ("a bzip2 archive", b"BZh91AY&SY".to_vec()),
            ("an xz archive", b"\xfd7zXZ\0".to_vec()),
            ("a 7-Zip archive", b"7z\xbc\xaf\x27\x1c".to_vec()),
            ("a tar archive", tar),
            ("a ggml file from before GGUF", b"tjgg\x03\0\0\0".to_vec()),
            ("a llamafile", b"MZqFpD='\n".to_vec()),
            ("a TFLite model", b"\x1c\0\0\0TFL3".to_vec()),
            ("an ONNX model", b"\x08\x07\x12\x07pytorch\x1a\x05".to_vec()),
            ("a Core ML model", core_ml),
            ("a Parquet file", b"PAR1\x15".to_vec()),
            ("an Arrow file", b"ARROW1\0\0".to_vec()),
            ("an SQLite database", b"SQLite format 3\0".to_vec()),
            ("a PDF document", b"%PDF-1.7".to_vec()),
            ("text in UTF-16", b"\xff\xfe{\0".to_vec()),
        ];
        for content in CONTENTS {
            assert!(cases.iter().any(|(name, _)| *name == content.name), "no case for {}", content.name);
        }
        for (name, bytes) in cases {
            assert_eq!(content(&bytes).map(|c| c.name), Some(name));
        }
        // Ours, or nobody's: JSON, a safetensors header, GGUF, text, tables.
        for ours in [&b"{\"a\": 1}"[..], b"\x80\x02\0\0\0\0\0\0{\"a\":{}}", b"GGUF\x03\0\0\0", b"hello", b"a,b\n1,2\n"]
        {
            assert!(content(ours).is_none(), "{}", ours.escape_ascii());
        }
    }
}
