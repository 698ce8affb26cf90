//! Files that are no data Pocketlora reads, known by how they begin, with what makes data of them.

use super::place;
use crate::error::{Error, ErrorCode, Result};
use std::path::Path;

/// Extensions of data, or of what data is packed in, that is not read; tables and data bases come first, see [`is_table`].
pub(super) const EXTENSIONS: [&str; 27] = [
    "parquet", "arrow", "feather", "orc", "avro", "xlsx", "xls", "ods", "sqlite", "sqlite3", "db", "pkl", "pickle",
    "npz", "npy", "h5", "hdf5", "zip", "tar", "tgz", "7z", "rar", "xz", "bz2", "lz4", "yaml", "xml",
];

/// Whether a file's name is that of a table or a data base: data, not what data is packed in or refers to.
pub(super) fn is_table(path: &Path) -> bool {
    super::extension(path).is_some_and(|e| EXTENSIONS[..11].contains(&e.as_str()))
}

/// Whether a file's name is one of a form that settings have, too.
pub(super) fn is_settings(path: &Path) -> bool {
    super::extension(path).is_some_and(|e| matches!(e.as_str(), "yaml" | "xml"))
}

/// What makes a readable file of one that is not; FILE stands for its name.
enum Next {
    /// pandas reads it by this function.
    Pandas(&'static str),
    Command(&'static str),
    Words(&'static str),
}
use Next::{Command, Pandas, Words};

/// How a file begins (or what it holds at a place), and what it is.
const MAGIC: &[(usize, &[u8], &str, Next)] = &[
    (0, b"PAR1", "Parquet", Pandas("read_parquet")),
    (0, b"ARROW1", "Arrow (Feather)", Pandas("read_feather")),
    (
        0,
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        Words("export it as JSONL: `Dataset.from_file(FILE).to_json(NEW)` of `datasets`"),
    ),
    (0, b"ORC", "ORC", Pandas("read_orc")),
    (0, b"Obj\x01", "Avro", Words("export it as JSONL")),
    (0, b"SQLite format 3\0", "SQLite", Command("sqlite3 -csv -header FILE 'select * from TABLE' > NEW.csv")),
    (0, b"%PDF-", "PDF", Command("pdftotext FILE NEW.txt")),
    (0, b"{\\rtf", "RTF", Words("save it as plain text")),
    (0, b"\x28\xb5\x2f\xfd", "zstd within another packing", Command("zstd -d FILE")),
    (0, b"\xfd7zXZ\0", "xz", Command("xz -dk FILE")),
    (0, b"BZh", "bzip2", Command("bunzip2 -k FILE")),
    (0, b"\x04\x22\x4d\x18", "lz4", Command("lz4 -d FILE")),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip", Command("7z x FILE")),
    (0, b"Rar!", "RAR", Command("unrar x FILE")),
    (257, b"ustar", "tar", Command("tar -xf FILE")),
    (0, b"\x89HDF", "HDF5", Pandas("read_hdf")),
    (0, b"\x93NUMPY", "NumPy", Words("export it as JSONL")),
    (0, b"\xd0\xcf\x11\xe0", "an older Excel or Word file", Words("save it as CSV or plain text")),
    (0, b"GGUF", "GGUF, a model", Words("give it as `-m`, and data as `-d`")),
    (0, b"\x89PNG", "PNG, a picture", Words("only text is learned")),
    (0, b"\xff\xd8\xff", "JPEG, a picture", Words("only text is learned")),
    (0, b"GIF8", "GIF, a picture", Words("only text is learned")),
    (0, b"RIFF", "RIFF (sound or pictures)", Words("only text is learned")),
    (0, b"ID3", "MP3, sound", Words("only text is learned")),
    (0, b"\x7fELF", "ELF, a program", Words("give a data file")),
];

/// What a zip archive is by a name within it.
const ZIPPED: &[(&[u8], &str, Next)] = &[
    (b"xl/", "Excel (.xlsx)", Pandas("read_excel")),
    (b"word/", "Word (.docx)", Command("pandoc -t plain -o NEW.txt FILE")),
    (b"application/epub+zip", "EPUB", Command("pandoc -t plain -o NEW.txt FILE")),
    (b"opendocument.spreadsheet", "an OpenDocument table", Pandas("read_excel")),
    (b"opendocument.text", "an OpenDocument text", Command("pandoc -t plain -o NEW.txt FILE")),
    (b".npy", "NumPy (.npz)", Words("export it as JSONL")),
    (b"data.pkl", "a PyTorch file", Words("export its data as JSONL")),
];

/// Refuses a file by the name of its format, unless it may be text.
pub(super) fn refuse(path: &Path, head: &[u8]) -> Result<()> {
    let holds = |part: &[u8]| head.windows(part.len()).any(|w| w == part);
    // Words of a text may begin as a format does (`ORC`), so all but two must hold bytes that no text has.
    let text =
        !head.iter().any(|b| *b < 9) && std::str::from_utf8(head).map_or_else(|e| e.error_len().is_none(), |_| true);
    let begins = |(at, magic, ..): &&(usize, &[u8], &str, Next)| {
        head.get(*at..).is_some_and(|h| h.starts_with(magic)) && (!text || matches!(*magic, b"%PDF-" | b"{\\rtf"))
    };
    if let Some((.., what, next)) = MAGIC.iter().find(begins) {
        return Err(unsupported(path, what, next));
    }
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        let inside = ZIPPED.iter().find(|(part, ..)| holds(part)).map(|(_, what, next)| (*what, next));
        let (what, next) = inside.unwrap_or(("zip", &Command("unzip FILE")));
        return Err(unsupported(path, what, next));
    }
    if head.first() == Some(&0x80) && matches!(head.get(1), Some(2..=5)) {
        return Err(unsupported(path, "a Python pickle", &Words("export its data as JSONL")));
    }
    let start = &head[..head.len().min(512)].trim_ascii_start().to_ascii_lowercase();
    if start.starts_with(b"version https://git-lfs") {
        let message = "expected data, got a Git LFS pointer, which only names it; fetch the file itself with `git lfs pull` \
                       in its folder";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    if start.starts_with(b"/annex/objects/") || start.starts_with(b"../.git/annex/") {
        let message =
            "expected data, got a git-annex pointer, which only names it; fetch the file itself with `git annex get`";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    // All that some servers send where there is no file, or no access to it.
    let answers: [&[u8]; 4] =
        [b"entry not found", b"repository not found", b"invalid username or password", b"access to dataset"];
    if head.len() < 512 && answers.iter().any(|answer| start.starts_with(answer)) {
        let message =
            "expected data, got a server's answer that there is no such file or no access to it; download it again";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    if start.starts_with(b"<!doctype html") || start.starts_with(b"<html") {
        let message = "expected data, got an HTML page, as a download without access or to the wrong address leaves it; open \
                       the file to see what it says, then download the data itself (`.../resolve/main/FILE` on the hub), or \
                       make plain text of a page: `pandoc -t plain -o NEW.txt OLD.html`";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    if start.starts_with(b"<?xml") {
        return Err(unsupported(path, "XML", &Pandas("read_xml")));
    }
    if head.contains(&0) {
        let message =
            "expected text, got binary data; expected are JSON, JSONL, CSV, TSV or plain text in UTF-8 or UTF-16";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    Ok(())
}

/// An encoding that is not read.
pub(super) fn encoding(path: &Path, name: &str) -> Error {
    Error::unsupported(path, format!("text in {name}"), format!("convert it: `iconv -f {name} -t UTF-8 OLD > NEW`"))
}

fn unsupported(path: &Path, what: &str, next: &Next) -> Error {
    // Only plain names can stand in a command as they are.
    let plain = |c: char| c.is_alphanumeric() || "/._-+@".contains(c);
    let name = path.to_str().filter(|p| p.chars().all(plain)).unwrap_or("FILE");
    let next = match next {
        Pandas(function) => {
            let stem =
                path.file_stem().and_then(|s| s.to_str()).filter(|s| name != "FILE" && !s.is_empty()).unwrap_or("NEW");
            format!(
                "convert it: `python3 -c \"import pandas; pandas.{function}('{name}').to_json('{stem}.jsonl', \
                 orient='records', lines=True, force_ascii=False)\"` (pip install pandas pyarrow)"
            )
        }
        Command(command) => format!("convert or unpack it: `{}`", command.replace("FILE", name)),
        Words(words) => (*words).to_owned(),
    };
    Error::unsupported(path, format!("{what} as data"), next)
}
