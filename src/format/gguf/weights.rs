//! The tensors of a checkpoint, read from those of the file.

use super::config::{Draft, EMBEDDING, HEAD};
use super::container::{Container, GgufTensor};
use super::families::Family;
use super::order::{ByHead, Heads, Order};
use super::places::{Found, Made, Tiled};
use super::rope;
use crate::error::{Error, Result};
use crate::format::{LeftOut, TensorMeta};
use pocketlora_models::{Layout, Model, ParamSpec};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// One weight of the model: its Hugging Face description, and what it is made of.
#[derive(Clone, Debug)]
pub(super) struct Weight {
    pub(super) meta: TensorMeta,
    /// Numbers of its tensors in the directory.
    parts: Vec<usize>,
    order: Order,
    values: Values,
    /// Checkpoints have it as `[in, out]`, and this is `[out, in]`.
    pub(super) by_rows: bool,
}

/// What is done to the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    Same,
    /// The file has 1 added.
    LessOne,
    /// The file has `-exp` of them.
    Log,
}

impl Weight {
    /// Reads `rows` of the leading dimension, of a vector all of it, into `out`.
    pub(super) fn read(&self, file: &Container, rows: Range<usize>, out: &mut [f32]) {
        let shape = &self.meta.shape;
        match (&self.order, shape.len()) {
            (Order::Number(number), _) => out.fill(*number),
            (_, 0 | 1) => self.read_vector(file, out),
            _ => {
                let inner: usize = shape[1..shape.len() - 1].iter().product();
                self.read_matrix(file, rows.start * inner..rows.end * inner, out);
            }
        }
        match self.values {
            Values::Same => {}
            Values::LessOne => out.iter_mut().for_each(|x| *x -= 1.0),
            Values::Log => out.iter_mut().for_each(|x| *x = (-*x).ln()),
        }
    }

    fn read_vector(&self, file: &Container, out: &mut [f32]) {
        let places: Vec<(usize, usize)> = (0..out.len()).map(|i| self.order.at(i)).collect();
        for (part, index) in self.parts.iter().enumerate() {
            let tensor = &file.tensors[*index];
            let mine = || places.iter().filter(|(of, _)| *of == part).map(|(_, at)| *at);
            let (Some(least), Some(most)) = (mine().min(), mine().max()) else { continue };
            let columns = tensor.columns();
            let rows = least / columns..most / columns + 1;
            let mut stored = vec![0.0; rows.len() * columns];
            file.read_rows(tensor, rows.clone(), &mut stored);
            for (y, (_, at)) in out.iter_mut().zip(&places).filter(|(_, (of, _))| *of == part) {
                *y = stored[at - rows.start * columns];
            }
        }
    }

    fn read_matrix(&self, file: &Container, rows: Range<usize>, out: &mut [f32]) {
        let columns = self.meta.shape.last().copied().unwrap_or(1);
        assert_eq!(out.len(), rows.len() * columns, "values for rows {rows:?} of `{}`", self.meta.name);
        let tensor = |part: usize| &file.tensors[self.parts[part]];
        match self.order {
            Order::From(first) => file.read_rows(tensor(0), first + rows.start..first + rows.end, out),
            Order::Columns(heads) => {
                file.read_rows(tensor(0), rows, out);
                let mut stored = vec![0.0; columns];
                for row in out.chunks_exact_mut(columns) {
                    stored.copy_from_slice(row);
                    row.iter_mut().enumerate().for_each(|(c, y)| *y = stored[heads.at(c)]);
                }
            }
            Order::Latent { plain, value } => {
                // The columns of a head, read once for all of its rows.
                let mut block = (usize::MAX, vec![0.0; columns * plain]);
                for (row, y) in rows.zip(out.chunks_exact_mut(columns)) {
                    let (head, inside) = (row / (plain + value), row % (plain + value));
                    if inside >= plain {
                        let (part, at) = self.order.at(row);
                        file.read_rows(tensor(part), at..at + 1, y);
                        continue;
                    }
                    if block.0 != head {
                        block.0 = head;
                        file.read_rows(tensor(0), head * columns..(head + 1) * columns, &mut block.1);
                    }
                    y.iter_mut().enumerate().for_each(|(c, y)| *y = block.1[c * plain + inside]);
                }
            }
            _ => {
                for (row, y) in rows.zip(out.chunks_exact_mut(columns)) {
                    let (part, at) = self.order.at(row);
                    file.read_rows(tensor(part), at..at + 1, y);
                }
            }
        }
    }
}

/// The weights of `model` in the file, in the order in which they lie there, and what is left out.
///
/// # Errors
/// A tensor is missing, has another shape than metadata says, or has no place in the model.
pub(super) fn find(draft: &Draft<'_>, family: &Family, model: &dyn Model) -> Result<(Vec<Weight>, Vec<LeftOut>)> {
    let file = draft.keys.file;
    let numbers: HashMap<&str, usize> = file.tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    let rows =
        model.params().iter().map(|spec| (spec.name.as_str(), spec.stored().first().copied().unwrap_or(1))).collect();
    let finder = Finder { draft, family, file, numbers, rows };
    let mut used = vec![false; file.tensors.len()];
    let mut places = Vec::new();
    let mut seen = HashSet::new();
    for spec in model.params() {
        // Those of a stack are one tensor.
        if seen.insert(spec.name.as_str()) {
            let place = finder.place(spec)?;
            place.tensors.iter().filter_map(|name| finder.number(name)).for_each(|i| used[i] = true);
            places.push((spec, place));
        }
    }
    let ignored = model.outline().ignored.iter().flat_map(|name| family.places_of(name));
    ignored.flat_map(|found| found.tensors).filter_map(|name| finder.number(&name)).for_each(|i| used[i] = true);
    let mut further = LeftOut { part: "layers that predict further tokens".to_owned(), tensors: 0, bytes: 0 };
    for (tensor, _) in file.tensors.iter().zip(&used).filter(|(_, used)| !**used) {
        let layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
        match tensor.name.as_str() {
            rope::FREQS | rope::LONG | rope::SHORT => {}
            name if draft.copy == Some(name) => {}
            _ if layer.is_some_and(|layer| draft.further(layer)) => further.add(tensor.bytes()),
            name => {
                let what = format_args!("tensor `{name}` in a `{}` model of {} layers", family.name, draft.layers);
                let next = "the file is of a variant of the family that does not run; use a model of the plain family";
                return Err(Error::unsupported(file.metadata.path(), what, next));
            }
        }
    }
    let mut weights = places.into_iter().map(|(spec, place)| finder.weight(spec, place)).collect::<Result<Vec<_>>>()?;
    weights.sort_by_key(|w| w.parts.first().map(|part| (file.tensors[*part].offset(), w.first())));
    Ok((weights, (further.tensors > 0).then_some(further).into_iter().collect()))
}

struct Finder<'a> {
    draft: &'a Draft<'a>,
    family: &'a Family,
    file: &'a Container,
    numbers: HashMap<&'a str, usize>,
    /// Rows of each of the checkpoint's tensors.
    rows: HashMap<&'a str, usize>,
}

impl Finder<'_> {
    /// Of queries, keys and values in one tensor, here of `rows`: the first row of those that checkpoints call `name`, and the
    /// rows that there must be. A layer that takes another's values leaves the rows of its own alone.
    fn of_qkv(&self, name: &str, rows: usize) -> (usize, usize) {
        const PARTS: [&str; 3] = [".q_proj.", ".k_proj.", ".v_proj."];
        let own = PARTS.iter().position(|part| name.contains(part)).unwrap_or(0);
        let of = PARTS.map(|part| self.rows.get(&name.replacen(PARTS[own], part, 1)[..]).copied());
        let all: usize = of.iter().flatten().sum();
        (of[..own].iter().flatten().sum(), if of.contains(&None) { all.max(rows) } else { all })
    }

    fn number(&self, name: &str) -> Option<usize> {
        // The better copy of a tied matrix is the embedding, whatever the file calls it.
        let name = if name == EMBEDDING && self.draft.copy == Some(EMBEDDING) { HEAD } else { name };
        self.numbers.get(name).copied()
    }

    /// The first place of `spec` whose tensors are there, else the likeliest.
    fn place(&self, spec: &ParamSpec) -> Result<Found> {
        let mut all = self.family.places_of(&spec.name);
        let there =
            |found: &Found| found.place.key().is_some() || found.tensors.iter().all(|name| self.number(name).is_some());
        match all.iter().position(there) {
            Some(at) => Ok(all.swap_remove(at)),
            None if all.is_empty() => {
                let what = format_args!("`{}` in architecture `{}`", spec.name, self.family.name);
                Err(Error::unsupported(self.file.metadata.path(), what, "use the model's safetensors files"))
            }
            None => Ok(all.swap_remove(0)),
        }
    }

    /// The weight at `found`, once its tensors are known to be there in the right shapes.
    fn weight(&self, spec: &ParamSpec, found: Found) -> Result<Weight> {
        let meta = &self.file.metadata;
        let by_rows = spec.layout == Layout::Transposed;
        let shape = if by_rows { spec.shape.clone() } else { spec.stored() };
        let name = spec.name.clone();
        if let Some(key) = found.place.key() {
            let at = found.layer.unwrap_or(0);
            let number = match meta.floats(key) {
                Ok(Some(list)) => list.get(at).copied(),
                _ => meta.float(key)?.map(|x| x as f32),
            };
            let number = meta.required(key, number)?;
            let meta = TensorMeta { name, shape, dtype: "F32".to_owned() };
            let order = Order::Number(number);
            return Ok(Weight { meta, parts: Vec::new(), order, values: Values::Same, by_rows });
        }
        let mut parts = Vec::new();
        for (part, tensor) in found.tensors.iter().enumerate() {
            let Some(index) = self.number(tensor) else {
                return Err(Error::format(meta.path(), format_args!("tensor `{tensor}`"), "a tensor", "none"));
            };
            let stored = &self.file.tensors[index];
            let wanted = self.wanted(spec, &shape, found.place.made, part, stored);
            if !alike(&stored.shape, &wanted) {
                let item = format_args!("tensor `{}`", stored.name);
                let want = format!("shape {wanted:?} from metadata");
                return Err(Error::format(meta.path(), item, want, format!("{:?}", stored.shape)));
            }
            parts.push(index);
        }
        let order = self.order(spec, &shape, &found);
        let plus_one =
            self.family.plus_one && name.ends_with("norm.weight") && !name.ends_with("linear_attn.norm.weight");
        let values = match name.as_str() {
            name if name.ends_with(".A_log") => Values::Log,
            _ if plus_one => Values::LessOne,
            _ => Values::Same,
        };
        let dtype = self.file.tensors[parts[0]].dtype.to_string();
        Ok(Weight { meta: TensorMeta { name, shape, dtype }, parts, order, values, by_rows })
    }

    fn size(&self, key: &str) -> usize {
        self.draft.json.get(key).and_then(serde_json::Value::as_u64).map_or(1, |size| size as usize)
    }

    /// The shape in the file of a part of `spec`, which checkpoints have as `shape`.
    fn wanted(&self, spec: &ParamSpec, shape: &[usize], made: Made, part: usize, stored: &GgufTensor) -> Vec<usize> {
        let mut wanted = shape.to_vec();
        let of_rows = wanted.len().saturating_sub(2);
        match made {
            Made::Same | Made::Older | Made::Tiled(_) | Made::Listed => {}
            Made::Expert => wanted.insert(0, self.experts()),
            Made::HalfExpert(_) => {
                wanted[of_rows] *= 2;
                wanted.insert(0, self.experts());
            }
            Made::OfQkv => wanted[of_rows] = self.of_qkv(&spec.name, stored.shape.first().copied().unwrap_or(0)).1,
            Made::Halves => wanted[of_rows] /= 2,
            Made::Turns => {
                wanted[of_rows] /= 2;
                wanted.insert(0, self.experts());
            }
            Made::ByHead => {
                let ByHead { keys, key, value } = self.by_head();
                wanted[0] = keys * if part == 0 { 2 * key + value } else { value };
            }
            Made::Latent => {
                let (heads, plain, value) = self.latent();
                wanted = if part == 0 { vec![heads, shape[1], plain] } else { vec![heads, value, shape[1]] };
            }
        }
        wanted
    }

    fn experts(&self) -> usize {
        let keys = ["num_local_experts", "num_experts"];
        keys.iter().map(|key| self.size(key)).max().unwrap_or(1)
    }

    fn by_head(&self) -> ByHead {
        let keys = self.size("linear_num_key_heads");
        let per = self.size("linear_num_value_heads") / keys;
        ByHead { keys, key: self.size("linear_key_head_dim"), value: per * self.size("linear_value_head_dim") }
    }

    /// Heads, and the parts of one that come of columns and of rows.
    fn latent(&self) -> (usize, usize, usize) {
        (self.size("num_attention_heads"), self.size("qk_nope_head_dim"), self.size("v_head_dim"))
    }

    fn order(&self, spec: &ParamSpec, shape: &[usize], found: &Found) -> Order {
        let of_rows = shape.len().saturating_sub(2);
        let rows = shape.get(of_rows).copied().unwrap_or(1);
        let first = if found.place.made == Made::OfQkv { self.of_qkv(&spec.name, 0).0 } else { 0 };
        match found.place.made {
            Made::Same | Made::OfQkv if found.turned && self.family.interleaved => {
                Order::Interleaved(first, self.size("head_dim"))
            }
            Made::Same | Made::Older | Made::OfQkv | Made::Listed => Order::From(first),
            Made::Expert => Order::From(found.expert * rows),
            Made::HalfExpert(half) => Order::From((2 * found.expert + half) * rows),
            Made::Halves => Order::Halves(rows / 2),
            Made::Turns => Order::Turns(found.expert * (rows / 2)),
            Made::ByHead => Order::ByHead(self.by_head()),
            Made::Tiled(of) => {
                let keys = self.size("linear_num_key_heads");
                let width = if of == Tiled::Each { 1 } else { self.size("linear_value_head_dim") };
                let heads = Heads { keys, per: self.size("linear_num_value_heads") / keys, width };
                match of {
                    Tiled::Columns => Order::Columns(heads),
                    Tiled::Tail => Order::Tiled(2 * keys * self.size("linear_key_head_dim"), heads),
                    Tiled::Rows | Tiled::Each => Order::Tiled(0, heads),
                }
            }
            Made::Latent => {
                let (_, plain, value) = self.latent();
                Order::Latent { plain, value }
            }
        }
    }
}

impl Weight {
    /// The first row that it has of its first part.
    fn first(&self) -> usize {
        match self.order {
            Order::From(first) | Order::Interleaved(first, _) | Order::Turns(first) => first,
            _ => 0,
        }
    }
}

/// Whether two shapes are one but for dimensions of 1; a vector may be cut into rows.
fn alike(stored: &[usize], wanted: &[usize]) -> bool {
    let counted = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
    let wanted = counted(wanted);
    counted(stored) == wanted || (wanted.len() == 1 && stored.iter().product::<usize>() == wanted[0])
}
