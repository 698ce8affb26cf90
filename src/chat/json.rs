//! The filter `tojson` as chat templates mean it: Python's `json.dumps`, with `ensure_ascii=False` unless the template
//! says otherwise.

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, State, Value};
use serde_json::Value as Json;

/// Bytes per unit of a template's fuel, as for everything else it handles.
const BYTES_PER_FUEL: u64 = 64;
/// Longest indentation of a level, in bytes.
const MAX_INDENT: usize = 16;

/// How `json.dumps` lays its text out.
struct Layout {
    ascii: bool,
    /// Written once for each level at a line's beginning; without it all is on one line.
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// `value | tojson(ensure_ascii, indent, separators, sort_keys)`, each by place or by name.
pub(super) fn python_json(
    state: &State<'_, '_>,
    value: &Value,
    places: Rest<Value>,
    names: Kwargs,
) -> Result<Value, Error> {
    let mut places = places.0.into_iter();
    let mut given = |name: &str| -> Result<Option<Value>, Error> {
        let (by_place, by_name) = (places.next(), names.get::<Option<Value>>(name)?);
        if by_place.is_some() && by_name.is_some() {
            return Err(wrong(format!("`{name}` is given twice")));
        }
        Ok(by_place.or(by_name).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = given("ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = given("indent")?.map(|v| indentation(&v)).transpose()?;
    let separators = given("separators")?;
    let sorted = given("sort_keys")?.is_some_and(|v| v.is_true());
    if places.next().is_some() {
        return Err(wrong("more than `ensure_ascii`, `indent`, `separators` and `sort_keys` is given"));
    }
    names.assert_all_used()?;
    let (item, key) = match separators {
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            match &pair[..] {
                [item, key] => (text("separators", item)?, text("separators", key)?),
                _ => return Err(wrong("`separators` is not two texts")),
            }
        }
    };
    let value = serde_json::to_value(value).map_err(wrong)?;
    let mut out = String::new();
    Layout { ascii, indent, item, key, sorted }.write(&value, 0, &mut out);
    state.consume_fuel(out.len() as u64 / BYTES_PER_FUEL)?;
    Ok(Value::from_safe_string(out))
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"))
}

fn text(name: &str, value: &Value) -> Result<String, Error> {
    value.as_str().map(str::to_owned).ok_or_else(|| wrong(format!("`{name}` is no text")))
}

/// A number of spaces, or the text itself.
fn indentation(value: &Value) -> Result<String, Error> {
    let text = match value.as_str() {
        Some(text) => text.to_owned(),
        None => match i64::try_from(value.clone()) {
            Ok(n) => " ".repeat(usize::try_from(n).unwrap_or(0).min(MAX_INDENT + 1)),
            Err(_) => return Err(wrong("`indent` is neither a number nor a text")),
        },
    };
    if text.len() > MAX_INDENT { Err(wrong(format!("`indent` is over {MAX_INDENT} characters"))) } else { Ok(text) }
}

impl Layout {
    fn write(&self, value: &Json, level: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) if n.is_f64() => out.push_str(&python_float(n.as_f64().unwrap_or(f64::NAN))),
            Json::Number(n) => out.push_str(&n.to_string()),
            Json::String(text) => self.string(text, out),
            Json::Array(list) if list.is_empty() => out.push_str("[]"),
            Json::Array(list) => {
                out.push('[');
                for (i, value) in list.iter().enumerate() {
                    self.before(i, level + 1, out);
                    self.write(value, level + 1, out);
                }
                self.line(level, out);
                out.push(']');
            }
            Json::Object(map) if map.is_empty() => out.push_str("{}"),
            Json::Object(map) => {
                let mut keys: Vec<(&String, &Json)> = map.iter().collect();
                if self.sorted {
                    // Characters rise as their bytes in UTF-8 do.
                    keys.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (i, (key, value)) in keys.into_iter().enumerate() {
                    self.before(i, level + 1, out);
                    self.string(key, out);
                    out.push_str(&self.key);
                    self.write(value, level + 1, out);
                }
                self.line(level, out);
                out.push('}');
            }
        }
    }

    /// What stands before item number `i`.
    fn before(&self, i: usize, level: usize, out: &mut String) {
        if i > 0 {
            out.push_str(&self.item);
        }
        self.line(level, out);
    }

    fn line(&self, level: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..level).for_each(|_| out.push_str(indent));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                // The marks of special tokens are taken out later.
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) && !super::plain::is_mark(c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Python's text of a value, if it is a number with a fraction.
pub(super) fn python_float_of(value: &Value) -> Option<String> {
    let is_float = value.is_number() && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten().map(python_float)
}

/// A number as Python's `repr` writes it: the shortest digits that say it, with an exponent from 1e16 on and below 1e-4.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    /// What Python's `json.dumps` prints of the same values (CPython 3.11).
    #[test]
    fn options_do_what_they_do_in_python() {
        let mut env = Environment::new();
        env.add_filter("tojson", python_json);
        let v = "{'b': [1, 2.0, 1e-5, 1e16, 12345.5], 'a': {'é': '\"\\n\u{1f600}<', 'e': []}, 'n': none, 't': true}";
        let cases = [
            ("", r#"{"b": [1, 2.0, 1e-05, 1e+16, 12345.5], "a": {"é": "\"\n😀<", "e": []}, "n": null, "t": true}"#),
            (
                "(ensure_ascii=true, separators=(',', ':'))",
                r#"{"b":[1,2.0,1e-05,1e+16,12345.5],"a":{"\u00e9":"\"\n\ud83d\ude00<","e":[]},"n":null,"t":true}"#,
            ),
            (
                "(sort_keys=true)",
                r#"{"a": {"e": [], "é": "\"\n😀<"}, "b": [1, 2.0, 1e-05, 1e+16, 12345.5], "n": null, "t": true}"#,
            ),
            (
                "(true, 1, none, true)",
                "{\n \"a\": {\n  \"e\": [],\n  \"\\u00e9\": \"\\\"\\n\\ud83d\\ude00<\"\n },\n \"b\": [\n  1,\n  2.0,\n  \
                 1e-05,\n  1e+16,\n  12345.5\n ],\n \"n\": null,\n \"t\": true\n}",
            ),
            (
                "(indent='--', separators=(';', '='))",
                "{\n--\"b\"=[\n----1;\n----2.0;\n----1e-05;\n----1e+16;\n----12345.5\n--];\n--\"a\"={\n----\"é\"=\"\\\"\\n\
                 😀<\";\n----\"e\"=[]\n--};\n--\"n\"=null;\n--\"t\"=true\n}",
            ),
        ];
        for (options, expected) in cases {
            let printed = env.render_str(&format!("{{{{ {v} | tojson{options} }}}}"), ()).unwrap();
            assert_eq!(printed, expected, "tojson{options}");
        }
        for refused in
            ["(colour=1)", "(indent=99)", "(separators=3)", "(true, ensure_ascii=true)", "(1, 1, none, 1, 1)"]
        {
            assert!(env.render_str(&format!("{{{{ 1 | tojson{refused} }}}}"), ()).is_err(), "tojson{refused}");
        }
    }
}
