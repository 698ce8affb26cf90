//! Every reader is total: whatever a file holds, it ends in records or in an error.

use super::*;
use std::fs;

/// Reads `bytes` as a file of that name: records, or the message of an error.
fn read_bytes(dir: &Path, name: &str, bytes: &[u8]) -> Result<usize, String> {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    let (mut unused, mut n) = (Unused::default(), 0);
    let read = read(&path, Purpose::Learn, &mut unused, &mut |entry, _, unused| {
        n += 1;
        match entry {
            Entry::Keys(fields) => record::Record::new(fields, unused).map(drop),
            Entry::Note(..) => Ok(()),
        }
    });
    read.map(|()| n).map_err(|e| e.to_string())
}

#[test]
fn broken_files_end_in_an_error_or_in_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let utf16: Vec<u8> = "\u{feff}{\"text\":\"a\u{1f600}\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut gzip = Vec::new();
    let mut packed = flate2::read::GzEncoder::new(&b"{\"text\":\"abc\"}\n"[..], flate2::Compression::fast());
    std::io::Read::read_to_end(&mut packed, &mut gzip).unwrap();
    let zstd: &[u8] =
        b"(\xb5/\xfd$#\x19\x01\x00{\x22prompt\x22:\x222+2=\x22,\x22completion\x22:\x224\x22}\x0a\xd8\xbe.6";
    let files: [(&str, &[u8]); 9] = [
        ("a.jsonl", b"{\"text\":\"a\\u00e9\"}\n{\"prompt\":\"p\",\"completion\":\"c\",\"x\":[1,{\"y\":null}]}\n"),
        ("a.json", b"{\"v\":1,\"data\":[{\"instruction\":\"q\",\"input\":NaN,\"output\":\"r\"},{\"text\":\"t\"}],\"w\":[2]}"),
        ("b.json", b"[{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"from\":\"gpt\",\"value\":\"r\",\"weight\":0}]}]"),
        ("c.json", b"{\"conversations\":[{\"from\":\"function_call\",\"value\":\"{\\\"name\\\":\\\"f\\\"}\"}],\"tools\":\"[]\"}"),
        ("a.csv", b"sep=;\nprompt;completion\n\"a;\"\"b\";c\nd;\"e\nf\"\n"),
        ("u.jsonl", &utf16),
        ("a.gz", &gzip),
        ("a.zst", zstd),
        ("a.md", b"\xef\xbb\xbf# T\n"),
    ];
    for (name, bytes) in files {
        assert!(
            read_bytes(dir.path(), name, bytes).is_ok_and(|n| n > 0),
            "{name} as it is: {:?}",
            read_bytes(dir.path(), name, bytes)
        );
        for end in 0..bytes.len() {
            let _ = read_bytes(dir.path(), name, &bytes[..end]);
        }
        let mut random = 7u64;
        for i in 0..400usize {
            random = crate::rng::mix(random, i as u64);
            let mut changed = bytes.to_vec();
            let at = i % bytes.len();
            match random % 4 {
                0 => changed[at] = b"{}[]\",:;\n\0\xff\\NI"[(random >> 8) as usize % 14],
                1 => changed[at] ^= 1 << ((random >> 8) % 8),
                2 => drop(changed.remove(at)),
                _ => changed.insert(at, b"{}[]\",:;\n\0\xff\\NI"[(random >> 8) as usize % 14]),
            }
            if let Err(message) = read_bytes(dir.path(), name, &changed) {
                assert!(message.contains(name) && message.len() < 2000, "{name}: {message}");
            }
        }
    }
}

#[test]
fn deep_and_endless_records_are_refused_without_filling_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let deep = format!("{{\"text\":{}{}}}", "[".repeat(1 << 17), "]".repeat(1 << 17));
    assert!(read_bytes(dir.path(), "a.jsonl", deep.as_bytes()).unwrap_err().contains("line 1"));
    // A packed bomb: a megabyte of one text in a kilobyte, and of one row.
    for (name, start) in [("a.jsonl.gz", "{\"text\":\""), ("a.csv.gz", "text\n\""), ("a.txt.gz", "")] {
        let long = std::io::Read::take(std::io::repeat(b'a'), 1 << 20);
        let mut packed =
            flate2::read::GzEncoder::new(std::io::Read::chain(start.as_bytes(), long), flate2::Compression::fast());
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut packed, &mut bytes).unwrap();
        let message = read_bytes(dir.path(), name, &bytes).unwrap_err();
        assert!(message.contains(&MAX_RECORD.to_string()), "{name}: {message}");
    }
}

#[test]
fn a_list_is_read_record_by_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    // It is cut off behind its records, which a reader of whole files would never give.
    fs::write(&path, format!("[{}", "{\"text\":\"abc\"},\n".repeat(1000))).unwrap();
    let mut places = Vec::new();
    let error = read(&path, Purpose::Learn, &mut Unused::default(), &mut |_, line, _| {
        places.push(line);
        Ok(())
    });
    assert_eq!(places, (1..=1000).collect::<Vec<_>>());
    assert!(error.unwrap_err().to_string().contains("cut off"));
}

#[test]
fn every_spelling_in_the_tables_is_of_one_key() {
    for key in ["instruction", "system_prompt", "conversations", "response", "sample_weight"] {
        let title = format!(" {}{}", key[..1].to_uppercase(), &key[1..]);
        for spelling in [key.to_uppercase(), key.replace('_', "-"), key.replace('_', " "), key.replace('_', ""), title]
        {
            assert!(keys::is_known(&spelling) && keys::same(key, &spelling), "{spelling}");
        }
    }
    assert!(!keys::is_known("id") && !keys::is_known(""));
}
