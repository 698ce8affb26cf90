//! `{% generation %}` blocks: what a template's author says the model writes.

use minijinja::value::{Object, Value};
use minijinja::{Error, State};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Name of the object that the replaced tags call.
const NAME: &str = "generation_marks";

/// Makes statements of the tags `{% generation %}` and `{% endgeneration %}`, which this engine does not know, so that
/// white space around them is cut as around any tag. Tells whether there were any.
pub(super) fn replace(text: &str) -> (String, bool) {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut marked) = (text, false);
    while let Some(start) = rest.find("{%") {
        // In `{%}` nothing ends.
        let Some(len) = rest[start + 2..].find("%}").map(|at| at + 2) else { break };
        let (tag, end) = (&rest[start + 2..start + len], start + len + 2);
        let signs = |c: char| matches!(c, '-' | '+');
        let method = match tag.trim_matches(|c: char| signs(c) || c.is_whitespace()) {
            "generation" => Some("start"),
            "endgeneration" => Some("end"),
            _ => None,
        };
        out.push_str(&rest[..start]);
        match method {
            Some(method) => {
                marked = true;
                let (before, after) = (&tag[..usize::from(tag.starts_with(signs))], tag.ends_with(signs));
                let after = if after { &tag[tag.len() - 1..] } else { "" };
                out.push_str(&format!("{{%{before} do {NAME}.{method}() {after}%}}"));
            }
            None => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    (out, marked)
}

/// Counts what one rendering prints, and remembers where blocks began and ended.
#[derive(Debug, Default)]
pub(super) struct Marks {
    written: AtomicUsize,
    spans: Mutex<Vec<Range<usize>>>,
}

impl Marks {
    /// The part of a rendering's context that the replaced tags call.
    pub(super) fn context(self: &Arc<Self>) -> Value {
        Value::from(BTreeMap::from([(NAME, Value::from_dyn_object(Arc::clone(self)))]))
    }

    /// A writer into `out` that counts.
    pub(super) fn counted<'a>(self: &Arc<Self>, out: &'a mut Vec<u8>) -> impl Write + use<'a> {
        Counted { out, marks: Arc::clone(self) }
    }

    /// The marked bytes; empty where a block was printed inside a macro, which hides its place.
    pub(super) fn spans(&self) -> Vec<Range<usize>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Object for Marks {
    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, _: &[Value]) -> Result<Value, Error> {
        let at = self.written.load(Ordering::Relaxed);
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        match (method, spans.last_mut()) {
            ("end", Some(last)) => last.end = at,
            _ => spans.push(at..at),
        }
        Ok(Value::UNDEFINED)
    }
}

struct Counted<'a> {
    out: &'a mut Vec<u8>,
    marks: Arc<Marks>,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.extend_from_slice(bytes);
        self.marks.written.store(self.out.len(), Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::replace;

    #[test]
    fn tags_are_told_from_what_looks_like_them() {
        for (text, marked) in [
            ("{%- generation -%}a{% endgeneration %}", true),
            ("{%}{{ a }}{% if b %}", false),
            ("{%", false),
            ("{%}", false),
            ("{% generation", false),
            ("%}{%%}{%-%}", false),
        ] {
            let (out, found) = replace(text);
            assert_eq!((found, out == text), (marked, !marked), "{text}: {out}");
        }
    }
}
