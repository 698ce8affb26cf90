use super::*;

const BASE: &str = "nf4-codes-1:0123456789abcdef";

fn parts() -> Parts {
    let part = |name: &str, bytes: &[u8]| (name.to_owned(), Bytes::copy_from_slice(bytes));
    Parts::from([part("adapter_config.json", b"{}"), part("beside/ia3/x", &[7; 40]), part("empty", b"")])
}

fn key(first: u8) -> Key {
    Key::new(&std::array::from_fn(|i| first.wrapping_add(i as u8)))
}

fn sealed(parts: &Parts, signer: Option<&Key>) -> Vec<u8> {
    seal(parts, &Sealing { key: &key(1), base: BASE, version: 3, signer }).unwrap()
}

fn opened(bytes: &[u8], change: impl FnOnce(&mut Opening<'_>)) -> Result<Sealed> {
    let key = key(1);
    let mut how = Opening { key: &key, base: Some(BASE), least_version: 3, signer: None };
    change(&mut how);
    open(bytes, Path::new("a.sealed"), &how)
}

/// The error, its code and a part of its text.
#[track_caller]
fn fails(result: Result<Sealed>, code: ErrorCode, says: &str) {
    let Err(error) = result else { panic!("it opened: {says}") };
    assert!(error.code() == code && error.to_string().contains(says), "{says}: {error}");
    assert!(error.place().starts_with("`a.sealed`"), "{error}");
}

#[test]
fn a_seal_opens_to_what_it_was_made_of_and_is_never_the_same() {
    let (signer, large) = (key(9), Parts::from([("x".to_owned(), vec![5; 2 * PIECE].into())]));
    for (parts, signer) in [(parts(), None), (parts(), Some(&signer)), (large, None)] {
        let [one, other] = [sealed(&parts, signer), sealed(&parts, signer)];
        assert_ne!(one, other);
        assert!(!one.windows(5).any(|bytes| bytes == [7; 5] || bytes == [5; 5]));
        for bytes in [one, other] {
            let found = opened(&bytes, |how| how.signer = signer.map(Key::public)).unwrap();
            assert_eq!((found.version, &*found.base, found.signer), (3, BASE, signer.map(Key::public)));
            assert_eq!(found.parts, parts);
        }
    }
}

#[test]
fn every_changed_byte_and_every_cut_fail() {
    let signer = key(9);
    for signer in [None, Some(&signer)] {
        let good = sealed(&parts(), signer);
        for at in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                let Err(error) = opened(&bytes, |_| ()) else { panic!("byte {at} may be changed") };
                let code = if (8..12).contains(&at) { ErrorCode::Unsupported } else { ErrorCode::Format };
                let told = ["changed", "cut", "layout"].iter().any(|word| error.to_string().contains(word));
                assert!(error.code() == code && told, "byte {at}: {error}");
            }
        }
        for length in 1..good.len() {
            fails(opened(&good[..length], |_| ()), ErrorCode::Format, "is cut");
        }
        fails(opened(&[], |_| ()), ErrorCode::Format, "another file");
        fails(opened(&[&good[..], &[0]].concat(), |_| ()), ErrorCode::Format, "behind its end");
    }
}

#[test]
fn pieces_that_are_moved_left_out_or_of_another_seal_fail() {
    let parts = Parts::from([("x".to_owned(), (0..3 * PIECE).map(|i| i as u8).collect::<Vec<_>>().into())]);
    let good = sealed(&parts, None);
    let body = good.len() - 3 * (PIECE + TAG);
    let piece = |bytes: &[u8], i: usize| bytes[body + i * (PIECE + TAG)..][..PIECE + TAG].to_vec();
    let [a, b, c] = [0, 1, 2].map(|i| piece(&good, i));
    let of_other = piece(&sealed(&parts, None), 0);
    for (pieces, says) in [
        ([&b, &a, &c].as_slice(), "piece 0"),
        (&[&a, &c, &b], "piece 1"),
        (&[&a, &b, &b], "piece 2"),
        (&[&of_other, &b, &c], "piece 0"),
        (&[&a, &b], "is cut"),
        (&[&a, &b, &c, &c], "behind its end"),
    ] {
        let mut bytes = good[..body].to_vec();
        pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
        fails(opened(&bytes, |_| ()), ErrorCode::Format, says);
    }
}

#[test]
fn each_reason_not_to_open_has_a_name() {
    let (signer, other) = (key(9), key(2));
    let [plain, signed] = [None, Some(&signer)].map(|signer| sealed(&parts(), signer));
    let with_other = Opening { key: &other, base: None, least_version: 0, signer: None };
    fails(open(&plain, Path::new("a.sealed"), &with_other), ErrorCode::Key, "the key that it was sealed with");
    fails(opened(&plain, |how| how.base = Some("other")), ErrorCode::AdapterMismatch, "for this base");
    fails(opened(&plain, |how| how.least_version = 4), ErrorCode::Outdated, "version 4 or a later one, got version 3");
    fails(opened(&plain, |how| how.signer = Some(signer.public())), ErrorCode::Key, "got none");
    fails(opened(&signed, |how| how.signer = Some(other.public())), ErrorCode::Key, "got that of");
    assert!(opened(&plain, |how| (how.base, how.least_version) = (None, 0)).is_ok());
    for names in ["../x", "/x", "a/../../x", "", "C:\\x", "."] {
        let parts = Parts::from([(names.to_owned(), vec![1].into())]);
        let how = Sealing { key: &other, base: BASE, version: 0, signer: None };
        assert_eq!(seal(&parts, &how).unwrap_err().code(), ErrorCode::Config, "{names}");
    }
}

#[test]
fn keys_are_bytes_or_digits() {
    let good = key(0x10);
    let digits = hex(good.bytes());
    for text in [good.bytes().to_vec(), digits.clone().into_bytes(), format!(" {}\r\n", digits.to_uppercase()).into()] {
        assert_eq!(Key::parse(&text, Path::new("k")).unwrap().bytes(), good.bytes());
    }
    for text in [&digits[1..], &format!("{digits}0"), &digits.replace("1f", "1g"), "", "short"] {
        assert_eq!(Key::parse(text.as_bytes(), Path::new("k")).unwrap_err().code(), ErrorCode::Key, "{text}");
    }
    assert!(!format!("{good:?}").contains("16"));
}
