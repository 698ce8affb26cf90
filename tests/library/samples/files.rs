//! Files as people have them: every form is read, or refused by its name; folders are read by what they hold.

use super::Reader;
use crate::common::check_all;
use pocketlora::ErrorCode;
use std::fs;

fn reader() -> Reader {
    Reader::family("qwen2", "<|endoftext|>", "<|im_end|>")
}

/// What is learned of each sample, without the end of text; texts begin behind their first token.
fn learned(reader: &Reader, file: &str, bytes: &[u8]) -> Result<Vec<String>, String> {
    let data = reader.read(file, bytes, 4096).map_err(|e| e.to_string())?;
    Ok(data.samples.iter().map(|s| reader.learned(s).concat().replace("<|im_end|>", "")).collect())
}

fn utf16(text: &str, big: bool, bom: bool) -> Vec<u8> {
    let units = bom.then_some(0xfeff).into_iter().chain(text.encode_utf16());
    units.flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
}

const LINE: &str = "{\"prompt\":\"2+2=\",\"completion\":\"4\"}\n";
const GZIP: &[u8] =
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xabV*(\xca\xcf-(Q\xb2R2\xd26\xb2U\xd2QJ\x06rsRK2\xf3\xf3\
    \x80b&J\xb5\x5c\x00\xc9\xe0\xb5\xc8#\x00\x00\x00";
const ZSTD: &[u8] = b"(\xb5/\xfd$#\x19\x01\x00{\x22prompt\x22:\x222+2=\x22,\x22completion\x22:\x224\x22}\x0a\xd8\xbe.6";
/// A frame of zstd that holds two bytes for other programs.
const SKIPPED: &[u8] = b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab";

#[test]
fn every_form_of_a_file_is_read() {
    let reader = reader();
    let two = ["b", "d"];
    let emoji = "{\"prompt\":\"é\",\"completion\":\"😀ß\"}";
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("list.json", br#"[{"prompt":"a","completion":"b"}, {"prompt":"c","completion":"d"}]"#.into(), &two),
        ("list.jsonl", b"[\n {\"prompt\":\"a\",\n \"completion\":\"b\"},\n {\"prompt\":\"c\",\"completion\":\"d\"},\n]\n".into(), &two),
        ("pretty.json", b"{\n \"prompt\": \"a\",\n \"completion\": \"b\"\n}\n{\n \"prompt\": \"c\",\n \"completion\": \"d\"\n}".into(), &two),
        ("one_line.jsonl", br#"{"prompt":"a","completion":"b"}{"prompt":"c","completion":"d"}"#.into(), &two),
        ("under.json", br#"{"version": 1, "data": [{"prompt":"a","completion":"b"},{"prompt":"c","completion":"d"}], "n": [2]}"#.into(), &two),
        ("splits.json", br#"{"test":[{"prompt":"x","completion":"y"}],"train":[{"prompt":"a","completion":"b"}]}"#.into(), &["b"]),
        (
            "viewer.json",
            br#"{"features":[],"rows":[{"row_idx":0,"row":{"prompt":"a","completion":"b"},"truncated_cells":[]}],"partial":false}"#.into(),
            &["b"],
        ),
        ("none", br#"{"prompt":"a","completion":"b"}"#.into(), &["b"]),
        ("named.csv", br#"[{"prompt":"a","completion":"b"}]"#.into(), &["b"]),
        ("lines.txt", br#"{"prompt":"a","completion":"b"}"#.into(), &["b"]),
        ("a link.md", b"[a](b) and {c}".into(), &["a](b) and {c}"]),
        ("some json.md", b"{\"a\": 1}".into(), &["\"a\": 1}"]),
        ("nan.jsonl", br#"{"instruction":"a","input":NaN,"output":"NaN b","score":-1.5e3}"#.into(), &["NaN b"]),
        ("a.tsv", b"prompt\tcompletion\na\tb\nc\td\n".into(), &two),
        ("semicolons.csv", b"id;prompt;completion\n1;a;b\n2;c;\"d\"\n".into(), &two),
        ("bars.csv", b"prompt|completion\r\na|b\r\nc|d\r\n".into(), &two),
        ("told.csv", b"sep=;\nprompt;completion\na;b\nc;d\n".into(), &two),
        ("commas.csv", b"prompt,completion\n\"a;\t|\",b\nc,d\n".into(), &two),
        ("one column.csv", b"text\nabc\n".into(), &["bc"]),
        ("tabs.csv", b"prompt\tcompletion\na, b\tc, d\n".into(), &["c, d"]),
        ("text.csv.txt", b"prompt,completion\na,b\n".into(), &["b"]),
        ("in text.csv", b"prompt,completion\na,x \"b\" y\nc,\"d, \"\"e\"\"\nf\"\n".into(), &["x \"b\" y", "d, \"e\"\nf"]),
        ("lines.tsv", b"prompt\tcompletion\r\na\t\"b\nc\"\r\n\"a\tb\"\td".into(), &["b\nc", "d"]),
        ("pandas.csv", b"instruction,input,output\na,NaN,NA\nnan,c,None\n".into(), &["NA", "None"]),
        ("a.jsonl.gz", GZIP.into(), &["4"]),
        ("two.jsonl.gz", [GZIP, GZIP].concat(), &["4", "4"]),
        ("a.jsonl.zst", ZSTD.into(), &["4"]),
        ("misnamed.jsonl", [ZSTD, SKIPPED, ZSTD].concat(), &["4", "4"]),
        ("little.jsonl", utf16(emoji, false, true), &["😀ß"]),
        ("big.jsonl", utf16(emoji, true, true), &["😀ß"]),
        ("no mark.jsonl", utf16(emoji, false, false), &["😀ß"]),
        ("no mark, big.jsonl", utf16(emoji, true, false), &["😀ß"]),
        ("excel.csv", utf16("prompt\tcompletion\r\né\tß\r\n", false, true), &["ß"]),
        ("note.rst", utf16("aßc", true, true), &["ßc"]),
        ("long.jsonl", utf16(&LINE.repeat(3000), false, true), &["4"; 3000]),
    ];
    check_all(cases, |(file, bytes, expected)| {
        let found = learned(&reader, file, bytes);
        if found.as_ref().is_ok_and(|f| f == expected) {
            Ok(())
        } else {
            Err(format!("{file}: {found:?}, expected {expected:?}"))
        }
    });
}

#[test]
fn other_files_are_refused_by_their_format() {
    let reader = reader();
    let cut = |bytes: &[u8]| bytes[..bytes.len() - 9].to_vec();
    let mut tar = vec![b'a'; 257];
    tar.extend(b"ustar\x0000");
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a.parquet", b"PAR1\x15\x04".into(), "Parquet|read_parquet|orient='records'|a.parquet"),
        ("data.jsonl", b"PAR1\x15\x04".into(), "Parquet"),
        ("a.arrow", b"ARROW1\0\0".into(), "Arrow|read_feather"),
        ("a.xlsx", b"PK\x03\x04\x14\0\0\0xl/workbook.xml".into(), "Excel|read_excel"),
        ("a.docx", b"PK\x03\x04\x14\0\0\0word/document.xml".into(), "Word|pandoc"),
        ("a.zip", b"PK\x03\x04\x14\0\0\0train.jsonl".into(), "zip|unzip"),
        ("a.tar", tar, "tar -xf"),
        ("a.jsonl.xz", b"\xfd7zXZ\0".into(), "xz -dk"),
        ("a.jsonl.bz2", b"BZh91AY&SY\0".into(), "bunzip2"),
        ("a.db", b"SQLite format 3\0".into(), "SQLite|sqlite3"),
        ("a.pdf", b"%PDF-1.7".into(), "PDF|pdftotext"),
        ("a.pkl", b"\x80\x04\x95\0".into(), "pickle"),
        ("a.html", b"\n<!DOCTYPE html><html>".into(), "HTML"),
        ("a.jsonl", b"<html><body>404".into(), "HTML|download"),
        ("a.xml", b"<?xml version='1.0'?><a/>".into(), "XML|read_xml"),
        ("train.jsonl", lfs.into(), "Git LFS|git lfs pull"),
        ("train.csv", lfs.into(), "Git LFS|git lfs pull"),
        ("notes.txt", lfs.into(), "Git LFS|git lfs pull"),
        ("a.txt", b"Entry not found".into(), "no such file"),
        ("a.jsonl", b"/annex/objects/SHA256E-s5--00".into(), "git annex get"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0".into(), "PNG"),
        ("a.bin", b"abc\0def".into(), "binary"),
        ("wide.jsonl", b"\xff\xfe\0\0{\0\0\0".into(), "UTF-32|iconv"),
        ("latin.jsonl", b"{\"text\":\"caf\xe9\"}".into(), "line 1|`0xe9`|Windows-1252|iconv"),
        ("latin.csv", b"text\ncaf\xe9\n".into(), "latin.csv|Windows-1252|iconv"),
        ("half.jsonl", utf16(LINE, false, true)[..31].into(), "UTF-16|cut off"),
        ("lone.jsonl", [utf16("{\"text\":\"", false, true), vec![0, 0xd8, 0x22, 0, 0x7d, 0]].concat(), "UTF-16"),
        ("cut.jsonl.gz", cut(GZIP), "cut off|again"),
        ("cut.jsonl.zst", cut(ZSTD), "again"),
        (
            "sum.jsonl.zst",
            {
                let mut z = ZSTD.to_vec();
                *z.last_mut().unwrap() ^= 1;
                z
            },
            "checksum",
        ),
        ("empty.jsonl", vec![], "empty"),
        ("empty.csv", vec![], "empty"),
        ("empty.txt", vec![], "empty"),
        ("yaml.jsonl", b"- prompt: a\n".into(), "line 1|got `-`|.csv"),
        ("cut.json", b"[{\"text\":\"abc\"},\n{\"text\":\"abc\"}\n".into(), "line 2|in line 3|cut off"),
        ("open.jsonl", b"{\"text\":\"abc\"}\n{\"text\":\"abc\n".into(), "line 2|in its line"),
        ("brace.jsonl", b"{\"text\":\"abc\"}\n{\"text\":\"abc\"\n".into(), "line 2|in line 3|cut off"),
        ("bad.json", b"[\n{\"text\":\"abc\"},\n{\"text\":\n \"abc\" 1}]".into(), "line 3 (item 2)|in line 4"),
        ("between.json", b"[{\"text\":\"abc\"} {\"text\":\"abc\"}]".into(), "after item 1"),
        ("commas.jsonl", b"{\"text\":\"abc\"},\n{\"text\":\"abc\"}".into(), "comma"),
        ("numbers.json", b"[[1], 2]".into(), "item 1"),
        ("inf.jsonl", b"{\"text\":\"abc\",\"x\":-Infinity}".into(), "`Infinity`"),
        ("repr.jsonl", b"{'text': 'abc'}".into(), "json.dumps"),
        ("repr2.jsonl", b"{\"text\": \"abc\", \"x\": None}".into(), "json.dumps"),
        ("twice.jsonl", b"{\"text\":\"abc\",\"Text\":\"abc\"}".into(), "`text`|`Text`|once"),
        ("twice.csv", b"text,text\na,b\n".into(), "once"),
        ("beside.json", b"{\"data\":[{\"text\":\"abc\"}],\"system\":\"x\"}".into(), "`system`|beside"),
        ("two.json", b"{\"data\":[{\"text\":\"abc\"}],\"train\":[{\"text\":\"abc\"}]}".into(), "`train`|beside"),
        (
            "cells.json",
            b"{\"rows\":[{\"row_idx\":0,\"row\":{\"text\":\"abc\"},\"truncated_cells\":[\"text\"]}]}".into(),
            "viewer",
        ),
        ("columns.json", b"{\"prompt\":{\"0\":\"a\"},\"completion\":{\"0\":\"b\"}}".into(), "both texts"),
        (
            "turns.json",
            br#"[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]"#.into(),
            "`messages`|a turn",
        ),
        ("quote.csv", b"text\nabc\n\"def\nghi\n".into(), "quote"),
        ("swallowed.tsv", b"prompt\tcompletion\na\t\"b\nc\td\ne\t\"f\ng\th\n".into(), "line 2|a quote|twice"),
        ("swallowed.csv", b"prompt,completion\na,\"b\nc,d\ne,\"f\n".into(), "line 2|a quote|twice"),
        ("closed.tsv", b"prompt\tcompletion\r\na\t\"b\r\nc\td\"\r\n".into(), "line 2|a tab"),
        ("last.tsv", b"prompt\tcompletion\nc\td\na\t\"b".into(), "line 3|not closed"),
        ("last.csv", b"sep=,\nprompt,completion\nc,d\na,\"b\n".into(), "line 4|not closed"),
        ("begins.csv", b"prompt,completion\na,\"f\" x\n".into(), "line 2|before the cell ends"),
        ("slashes.csv", b"prompt,completion\na,\"say \\\"f\\\"\"\n".into(), "line 2|before the cell ends"),
        ("nothing.csv", b"instruction,output\na,NaN\n".into(), "line 2|`instruction`"),
        ("repr.csv", b"messages\n\"[{'role': 'user', 'content': 'q'}]\"\n".into(), "line 2|json.dumps"),
        ("columns2.json", b"{\"instruction\":[\"a\",\"b\"],\"output\":[\"c\",\"d\"]}".into(), "orient='records'"),
        ("columns3.json", b"{\"instruction\":{\"0\":\"a\"},\"output\":{\"0\":\"b\"}}".into(), "orient='records'"),
        ("split.json", b"{\"columns\":[\"text\"],\"index\":[0],\"data\":[[\"a\"]]}".into(), "orient='records'"),
        ("index.json", b"{\"0\":{\"text\":\"a\"},\"1\":{\"text\":\"b\"}}".into(), "orient='records'"),
        ("no items.json", b"{\"data\":[]}".into(), "`data` is empty"),
        ("inner.json", b"{\"data\":{\"train\":[{\"text\":\"a\"}]}}".into(), "`data`|`train`"),
        ("test.json", b"{\"test\":[{\"text\":\"a\"}]}".into(), "`test`"),
        ("ragged.tsv", b"prompt\tcompletion\na\tb\tc\n".into(), "line 2|tabs"),
    ];
    check_all(cases, |(file, bytes, words)| match reader.read(file, bytes, 4096) {
        Ok(data) => Err(format!("{file}: accepted with {} samples", data.samples.len())),
        Err(e) if !matches!(e.code(), ErrorCode::Data | ErrorCode::Unsupported) => Err(format!("{file}: {e}")),
        Err(e) => {
            let message = e.to_string();
            let missing =
                words.split('|').find(|w| !message.contains(*w)).or((!message.contains(*file)).then_some(*file));
            missing.map_or(Ok(()), |word| Err(format!("{file}: no `{word}` in: {message}")))
        }
    });
}

/// A folder with these files; `None` for content stands for a line of data that has the name in it.
fn folder(reader: &Reader, name: &str, files: &[(&str, Option<&[u8]>)]) -> std::path::PathBuf {
    let root = reader.path(name);
    fs::create_dir_all(&root).unwrap();
    for (file, bytes) in files {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let line = format!("{{\"prompt\":\"a\",\"completion\":\"{file}\"}}");
        fs::write(path, bytes.unwrap_or(line.as_bytes())).unwrap();
    }
    root
}

#[test]
fn a_folder_is_read_by_what_it_holds() {
    let reader = reader();
    let card: (&str, Option<&[u8]>) = ("README.md", Some(b"---\nlicense: mit\n---\n# Data"));
    let csv: Option<&[u8]> = Some(b"prompt,completion\na,table\n");
    // Files, what is learned, what is kept for evaluation, what is left out.
    type Case<'a> = (&'a str, Vec<(&'a str, Option<&'a [u8]>)>, &'a [&'a str], &'a [&'a str], &'a [&'a str]);
    let cases: Vec<Case> = vec![
        (
            "card",
            vec![card, ("data/train.jsonl", None), ("LICENSE", Some(b"MIT"))],
            &["data/train.jsonl"],
            &[],
            &["LICENSE", "README.md"],
        ),
        (
            "mlx",
            vec![("train.jsonl", None), ("valid.jsonl", None), ("test.jsonl", None)],
            &["train.jsonl"],
            &["test.jsonl", "valid.jsonl"],
            &[],
        ),
        (
            "hub",
            vec![
                ("data/train-00000-of-00002.json", None),
                ("data/train-00001-of-00002.json", None),
                ("data/validation-00000-of-00001.json", None),
            ],
            &["data/train-00000-of-00002.json", "data/train-00001-of-00002.json"],
            &["data/validation-00000-of-00001.json"],
            &[],
        ),
        (
            "dirs",
            vec![("train/a.jsonl", None), ("held_out/a.jsonl", None), ("b.jsonl", None)],
            &["train/a.jsonl"],
            &["held_out/a.jsonl"],
            &["b.jsonl"],
        ),
        (
            "no names",
            vec![("a.jsonl", None), ("b.csv", csv), ("my_eval.jsonl", None)],
            &["a.jsonl", "table"],
            &["my_eval.jsonl"],
            &[],
        ),
        ("only test", vec![("test.jsonl", None)], &["test.jsonl"], &[], &[]),
        (
            "facts",
            vec![
                ("dataset_infos.json", Some(b"{\"default\":{}}")),
                ("config.json", Some(b"{\"a\":[1]}")),
                ("x.json", None),
            ],
            &["x.json"],
            &[],
            &["config.json", "dataset_infos.json"],
        ),
        (
            "packed",
            vec![card, ("x.jsonl.gz", Some(GZIP)), ("cover.png", Some(b"\x89PNG\0"))],
            &["4"],
            &[],
            &["README.md", "cover.png"],
        ),
        (
            "notes",
            vec![
                ("README.md", Some(b"one")),
                ("b.org", Some(b"two")),
                ("LICENSE.txt", Some(b"no")),
                ("settings.json", Some(b"{\"a\":1}")),
                ("c.pdf", Some(b"%PDF-")),
            ],
            &["ne", "wo"],
            &[],
            &["LICENSE.txt", "c.pdf", "settings.json"],
        ),
        ("only a readme", vec![("README.md", Some(b"one"))], &["ne"], &[], &[]),
        ("attachments", vec![("a.md", Some(b"one")), ("b.zip", Some(b"PK\x03\x04\0"))], &["ne"], &[], &["b.zip"]),
    ];
    check_all(cases, |(name, files, expected, held_out, others)| {
        let root = folder(&reader, name, files);
        let data = reader.open(&root, 4096).map_err(|e| format!("{name}: {e}"))?;
        let found: Vec<String> =
            data.samples.iter().map(|s| reader.learned(s).concat().replace("<|im_end|>", "")).collect();
        let kept: Vec<String> = held_out.iter().map(|file| root.join(file).display().to_string()).collect();
        if found == *expected
            && data.unused.held_out == kept
            && data.unused.files == *others
            && data.unused.files_in_all == others.len()
        {
            let text = data.unused.text();
            let unsaid = held_out.iter().chain(*others).find(|file| !text.contains(**file));
            return unsaid.map_or(Ok(()), |file| Err(format!("{name}: no word of {file} in {text}")));
        }
        Err(format!("{name}: learned {found:?}, left out {:?}", data.unused))
    });
}

#[test]
fn a_folder_that_cannot_be_meant_is_refused_with_the_files_name() {
    let reader = reader();
    let card: (&str, Option<&[u8]>) = ("README.md", Some(b"# Data"));
    type Files = Vec<(&'static str, Option<&'static [u8]>)>;
    let cases: Vec<(&str, Files, &str)> = vec![
        ("parquet", vec![card, ("data/train.parquet", Some(b"PAR1\0"))], "train.parquet|Parquet|read_parquet"),
        ("excel", vec![card, ("a.xlsx", Some(b"PK\x03\x04\0xl/"))], "a.xlsx|Excel"),
        ("train", vec![("train.parquet", Some(b"PAR1\0")), ("test.jsonl", None)], "train.parquet|Parquet"),
        ("extra", vec![("data/train.parquet", Some(b"PAR1\0")), ("extra.jsonl", None)], "train.parquet|Parquet"),
        ("table", vec![("a.xlsx", Some(b"PK\x03\x04\0xl/")), ("extra.csv", Some(b"text\na\n"))], "a.xlsx|Excel"),
        ("packed", vec![("train.zip", Some(b"PK\x03\x04\0")), ("test.jsonl", None)], "train.zip|unzip"),
        ("yaml", vec![card, ("a.yaml", Some(b"a: 1"))], "a.yaml|JSONL"),
        ("twice", vec![("train.jsonl", None), ("train.csv", Some(b"text\na\n"))], "train.jsonl|train.csv|one form"),
        ("packed twice", vec![("train.jsonl", None), ("train.jsonl.gz", Some(GZIP))], "train.jsonl.gz|one form"),
        (
            "pointer",
            vec![("train.jsonl", Some(b"version https://git-lfs.github.com/spec/v1\n"))],
            "train.jsonl|git lfs pull",
        ),
        ("nothing", vec![("a.png", Some(b"\x89PNG\0"))], "a.png|`.jsonl`"),
        ("licence", vec![("LICENSE.md", Some(b"MIT"))], "LICENSE.md"),
        ("broken", vec![("a.json", Some(b"{\"text\": }"))], "a.json"),
    ];
    check_all(cases, |(name, files, words)| match reader.open(&folder(&reader, name, files), 4096) {
        Ok(data) => Err(format!("{name}: accepted, {:?}", data.unused)),
        Err(e) => {
            let message = e.to_string();
            words
                .split('|')
                .find(|w| !message.contains(*w))
                .map_or(Ok(()), |word| Err(format!("{name}: no `{word}` in: {message}")))
        }
    });
}

#[test]
fn a_folder_is_measured_by_what_is_held_out_in_it() {
    let reader = reader();
    type Case<'a> = (&'a str, Vec<&'a str>, Result<&'a [&'a str], &'a str>);
    let cases: Vec<Case> = vec![
        ("all", vec!["test.jsonl", "train.jsonl", "valid.jsonl"], Ok(&["valid.jsonl"])),
        ("test", vec!["test/a.jsonl", "train/a.jsonl", "b.jsonl"], Ok(&["test/a.jsonl"])),
        ("dev", vec!["a-dev.json", "a.json"], Ok(&["a-dev.json"])),
        ("train", vec!["train.jsonl"], Ok(&["train.jsonl"])),
        ("plain", vec!["a.jsonl", "b.jsonl"], Ok(&["a.jsonl", "b.jsonl"])),
        ("foreign", vec!["train.jsonl", "valid.parquet"], Err("valid.parquet")),
    ];
    check_all(cases, |(name, files, expected)| {
        let bytes = |file: &str| file.ends_with("parquet").then_some(&b"PAR1\0"[..]);
        let root =
            folder(&reader, &format!("measured {name}"), &files.iter().map(|f| (*f, bytes(f))).collect::<Vec<_>>());
        let limits = pocketlora::train::SampleLimits { tokens: 4096, vocab: 1000 };
        let data = pocketlora::train::Dataset::open_held_out(&root, &reader.tokenizer, &reader.template, limits);
        let (data, expected) = match (data, expected) {
            (Ok(data), Ok(expected)) => (data, expected),
            (Err(e), Err(word)) if e.to_string().contains(word) => return Ok(()),
            (data, _) => return Err(format!("{name}: {:?}", data.map(|d| d.unused))),
        };
        let text = data.unused.text();
        let (read, left) = text.split_once("not read").unwrap_or((&text, ""));
        let said = |file: &&str| if expected.contains(file) { read.contains(*file) } else { left.contains(*file) };
        let unsaid = files.iter().find(|file| !said(file));
        let right = data.records == expected.len() && unsaid.is_none();
        right.then_some(()).ok_or_else(|| format!("{name}: {text}"))
    });
}

#[cfg(unix)]
#[test]
fn links_to_folders_are_said_not_to_be_read() {
    let reader = reader();
    let root = folder(&reader, "linked", &[("train.jsonl", None)]);
    let other = folder(&reader, "elsewhere", &[("train.jsonl", None)]);
    std::os::unix::fs::symlink(other, root.join("more")).unwrap();
    assert_eq!(reader.open(&root, 4096).unwrap().unused.files, ["more"]);
}
