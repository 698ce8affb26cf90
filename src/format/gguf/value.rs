//! GGUF metadata: typed keys and values. Arrays stay in the map and are decoded when somebody asks, for a
//! vocabulary alone has a hundred thousand strings.

use super::cursor::Cursor;
use crate::error::{Error, Result};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

/// Arrays may hold arrays; files nest once at most, so a deeper one is an attempt to exhaust the stack.
const MAX_DEPTH: usize = 8;

/// The type of a value, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(cursor: &mut Cursor<'_>, item: &dyn Display) -> Result<Self> {
        let id = cursor.u32(item)?;
        let kind = usize::try_from(id).ok().and_then(|i| Self::ALL.get(i).copied());
        kind.ok_or_else(|| cursor.fail(item, "a value type from 0 to 12", id))
    }

    /// Bytes of one value; none where the length is written before it.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    fn read(cursor: &mut Cursor<'_>, kind: Kind, depth: usize, item: &dyn Display) -> Result<Self> {
        let Some(size) = kind.size() else {
            return match kind {
                Kind::String => cursor.string(item).map(|s| Self::String(s.to_owned())),
                _ => Array::read(cursor, depth + 1, item).map(Self::Array),
            };
        };
        let bytes = cursor.take(1, size, item)?;
        // Zero-extended: the casts below keep the low bytes, which are the value.
        let mut wide = [0; 8];
        wide[..size].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        Ok(match kind {
            Kind::U8 => Self::U8(bits as u8),
            Kind::I8 => Self::I8(bits as i8),
            Kind::U16 => Self::U16(bits as u16),
            Kind::I16 => Self::I16(bits as i16),
            Kind::U32 => Self::U32(bits as u32),
            Kind::I32 => Self::I32(bits as i32),
            Kind::F32 => Self::F32(f32::from_bits(bits as u32)),
            Kind::Bool if bits <= 1 => Self::Bool(bits == 1),
            Kind::Bool => return Err(cursor.fail(item, "a bool of 0 or 1", bits)),
            Kind::I64 => Self::I64(bits as i64),
            Kind::F64 => Self::F64(f64::from_bits(bits)),
            Kind::U64 | Kind::String | Kind::Array => Self::U64(bits),
        })
    }

    /// The value's type.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::U8(_) => Kind::U8,
            Self::I8(_) => Kind::I8,
            Self::U16(_) => Kind::U16,
            Self::I16(_) => Kind::I16,
            Self::U32(_) => Kind::U32,
            Self::I32(_) => Kind::I32,
            Self::F32(_) => Kind::F32,
            Self::Bool(_) => Kind::Bool,
            Self::String(_) => Kind::String,
            Self::Array(_) => Kind::Array,
            Self::U64(_) => Kind::U64,
            Self::I64(_) => Kind::I64,
            Self::F64(_) => Kind::F64,
        }
    }

    /// The value of any integer type that is not negative: writers differ in the width they choose.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value of either float type. An f32 becomes the shortest decimal that rounds to it, so that the epsilon
    /// `1e-5` is `1e-5` in `config.json`, too.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => v.to_string().parse().ok(),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }
}

/// An array, still encoded; its extent was walked when the file was opened.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    element: Kind,
    len: usize,
    bytes: Bytes,
}

impl Array {
    fn read(cursor: &mut Cursor<'_>, depth: usize, item: &dyn Display) -> Result<Self> {
        let element = Kind::read(cursor, item)?;
        let count = cursor.u64(item)?;
        let start = cursor.pos();
        skip(cursor, element, count, depth, item)?;
        let len = usize::try_from(count).map_err(|_| cursor.fail(item, "a length this machine can address", count))?;
        Ok(Self { element, len, bytes: cursor.since(start) })
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    #[must_use]
    pub fn element(&self) -> Kind {
        self.element
    }

    /// The elements, decoded one by one; `path` and `item` name the array in errors.
    ///
    /// # Errors
    /// An element is not a value of its type.
    pub fn values<'a>(&'a self, path: &'a Path, item: &'a dyn Display) -> impl Iterator<Item = Result<Value>> + 'a {
        let mut cursor = Cursor::new(path, &self.bytes);
        (0..self.len).map(move |_| Value::read(&mut cursor, self.element, 1, item))
    }
}

/// Moves past `count` elements. Each takes bytes, so the work is bounded by the file, whatever `count` claims.
fn skip(cursor: &mut Cursor<'_>, element: Kind, count: u64, depth: usize, item: &dyn Display) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(cursor.fail(item, format_args!("arrays nested at most {MAX_DEPTH} deep"), "a deeper nest"));
    }
    if let Some(size) = element.size() {
        return cursor.take(count, size, item).map(|_| ());
    }
    for _ in 0..count {
        if element == Kind::String {
            cursor.string(item)?;
        } else {
            let inner = Kind::read(cursor, item)?;
            let inner_count = cursor.u64(item)?;
            skip(cursor, inner, inner_count, depth + 1, item)?;
        }
    }
    Ok(())
}

/// All metadata of a file, by key.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// Reads `count` pairs.
    pub(super) fn read(cursor: &mut Cursor<'_>, count: u64, path: &Path) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for i in 0..count {
            let key = cursor.string(&format_args!("metadata key {i} of {count}"))?;
            let item = format!("metadata `{key}`");
            let kind = Kind::read(cursor, &item)?;
            let value = Value::read(cursor, kind, 0, &item)?;
            if entries.insert(key.to_owned(), value).is_some() {
                return Err(cursor.fail(&item, "one value", "a second one"));
            }
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key` as it is in the file.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// An error at `key`.
    pub(crate) fn fail(&self, key: &str, expected: impl Display, got: impl Display) -> Error {
        Error::format(&self.path, format_args!("metadata `{key}`"), expected, got)
    }

    /// `value`, or an error that says that `key` is missing.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.fail(key, "a value", "none"))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        cast: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match cast(value) {
            Some(v) => Ok(Some(v)),
            None if value.kind().size().is_some() => Err(self.fail(key, expected, format_args!("{value:?}"))),
            None => Err(self.fail(key, expected, value.kind())),
        }
    }

    /// A size or an id, of any integer type.
    pub(super) fn uint(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer that is not negative", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }

    /// A number with a fraction, of either float type.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite float", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// A switch.
    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| if let Value::Bool(b) = *v { Some(b) } else { None })
    }

    /// A text.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    fn array(&self, key: &str, expected: &str, fits: impl Fn(Kind) -> bool) -> Result<Option<&Array>> {
        self.typed(key, expected, |v| match v {
            Value::Array(a) if fits(a.element()) => Some(a),
            _ => None,
        })
    }

    /// A list of texts, borrowed from the map.
    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(array) = self.array(key, "an array of strings", |k| k == Kind::String)? else { return Ok(None) };
        let mut cursor = Cursor::new(&self.path, &array.bytes);
        (0..array.len).map(|_| cursor.string(&format_args!("metadata `{key}`"))).collect::<Result<_>>().map(Some)
    }

    /// All keys with their values, in alphabetical order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A list of numbers, of any type.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let expected = "an array of numbers";
        let Some(array) = self.array(key, expected, |k| k.size().is_some() && k != Kind::Bool)? else {
            return Ok(None);
        };
        let item = format_args!("metadata `{key}`");
        let number = |value: Value| match value {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            Value::I32(x) => Some(x as f32),
            other => other.as_u64().map(|x| x as f32),
        };
        array
            .values(&self.path, &item)
            .map(|v| v.and_then(|v| number(v.clone()).ok_or_else(|| self.fail(key, expected, format_args!("{v:?}")))))
            .collect::<Result<_>>()
            .map(Some)
    }

    /// A list of small integers, of any integer type.
    pub(super) fn uints(&self, key: &str) -> Result<Option<Vec<u64>>> {
        let expected = "an array of integers that are not negative";
        let Some(array) = self.array(key, expected, |k| k.size().is_some())? else { return Ok(None) };
        let item = format_args!("metadata `{key}`");
        let values = array.values(&self.path, &item);
        values
            .map(|v| v.and_then(|v| v.as_u64().ok_or_else(|| self.fail(key, expected, format_args!("{v:?}")))))
            .collect::<Result<_>>()
            .map(Some)
    }
}
