//! The filter `tojson` as chat templates mean it: Python's `json.dumps(value, ensure_ascii=False)`, which puts a space
//! after separators and leaves `<`, `>` and `&` alone.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};
use std::io::{self, Write};

/// Bytes per unit of a template's fuel, as for everything else it handles.
const BYTES_PER_FUEL: u64 = 64;

/// `value | tojson` and `value | tojson(indent=4)`.
pub(super) fn python_json(state: &State<'_, '_>, value: &Value, args: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = args.get("indent")?;
    // Key order and separators are Python's already, and all of Unicode is kept.
    for known in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = args.get(known)?;
    }
    args.assert_all_used()?;
    let mut out = Vec::new();
    let done = match indent {
        Some(n) => {
            let indent = b" ".repeat(n.min(16));
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(&indent)))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    };
    done.map_err(|e| Error::new(ErrorKind::InvalidOperation, "cannot serialize to JSON").with_source(e))?;
    state.consume_fuel(out.len() as u64 / BYTES_PER_FUEL)?;
    Ok(Value::from_safe_string(String::from_utf8(out).expect("JSON is text")))
}

/// `[1, 2]` and `{"a": 1}`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        CompactFormatter.begin_object_value(writer)?;
        writer.write_all(b" ")
    }
}
