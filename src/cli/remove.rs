//! `pocketlora remove`: something out of the cache, with all that was made from it.

use super::args::{megabytes, print_json};
use super::list::{value, what};
use crate::error::{Error, ErrorCode, Result};
use crate::hub::{Hub, Item, is_made_from, is_named};
use serde_json::json;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Names or paths as `pocketlora list` shows them. A model takes the copies that were made from it with it; of a model
    /// that lies elsewhere only the copies go.
    #[arg(required_unless_present = "stale")]
    names: Vec<String>,
    /// Remove the copies whose model has changed or is gone, and what killed programs left.
    #[arg(long)]
    stale: bool,
    /// Remove downloads from the hub's cache, too, which other programs share.
    #[arg(long, requires = "names")]
    downloads: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let hub = Hub::from_env()?;
    let items = hub.contents()?;
    let chosen = choose(args, &hub, &items)?;
    let (mut freed, mut removed, mut kept) = (0, Vec::new(), Vec::new());
    for &item in &chosen {
        match hub.remove(item)? {
            None => kept.push(item),
            Some(mut bytes) => {
                if args.downloads {
                    bytes += hub.remove_downloads(item)?;
                }
                freed += bytes;
                removed.push(item);
                if !args.json {
                    println!("removed {} {}: {}", what(item.kind), item.name, megabytes(bytes));
                }
            }
        }
    }
    if args.json {
        let values = |items: &[&Item]| items.iter().map(|i| value(i)).collect::<Vec<_>>();
        print_json(&json!({ "freed": freed, "removed": values(&removed), "in_use": values(&kept) }));
    } else {
        println!("{} freed", megabytes(freed));
    }
    if !args.downloads {
        for (folder, bytes) in removed.iter().filter_map(|i| i.shared.as_ref()) {
            eprintln!(
                "its files, {} in {}, are shared with other programs and stay; `--downloads` takes them away, too",
                megabytes(*bytes),
                folder.display()
            );
        }
    }
    match kept.first() {
        None => Ok(()),
        Some(item) => {
            let message = "is in use by a running program and was kept; end that program and remove it again";
            Err(Error::new(ErrorCode::Config, format!("{} `{}`", what(item.kind), item.name), message))
        }
    }
}

/// What was named or is stale, and what was made from it: copies before what they were made from.
fn choose<'i>(args: &Args, hub: &Hub, items: &'i [Item]) -> Result<Vec<&'i Item>> {
    let mut chosen: Vec<bool> = items.iter().map(|i| args.stale && i.stale.is_some()).collect();
    for wanted in &args.names {
        let named: Vec<usize> = (0..items.len()).filter(|&i| is_named(&items[i], wanted)).collect();
        if named.is_empty() {
            let message = format!(
                "expected something in the cache `{}`, got neither a name nor a path of it; `pocketlora list` shows \
                 them. What lies elsewhere is not for this command to remove",
                hub.home.display()
            );
            return Err(Error::new(ErrorCode::Config, format!("`{wanted}`"), message));
        }
        named.into_iter().for_each(|i| chosen[i] = true);
    }
    // Twice, for a head may be made from a copy that is made from a model.
    for _ in 0..2 {
        let now = chosen.clone();
        for (i, item) in items.iter().enumerate() {
            chosen[i] |= (0..items.len()).any(|j| now[j] && j != i && is_made_from(item, &items[j]));
        }
    }
    let mut chosen: Vec<&Item> = items.iter().zip(chosen).filter(|(_, c)| *c).map(|(i, _)| i).collect();
    chosen.sort_by_key(|i| std::cmp::Reverse(i.kind.is_derived()));
    Ok(chosen)
}
