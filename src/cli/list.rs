//! `pocketlora list`: what the cache holds.

use super::args::{megabytes, print_json};
use crate::error::Result;
use crate::hub::{Hub, Item, Kind};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if !args.json {
        return print();
    }
    let hub = Hub::from_env()?;
    let items = hub.contents()?;
    print_json(&json!({
        "home": hub.home, "hub_cache": hub.hub_cache, "limit": hub.limit,
        "bytes": items.iter().map(|i| i.bytes).sum::<u64>(),
        "stale_bytes": stale_bytes(&items),
        "items": items.iter().map(|item| with_adapters(&hub, item, &items)).collect::<Vec<_>>(),
    }));
    Ok(())
}

/// The list for people.
pub(super) fn print() -> Result<()> {
    let hub = Hub::from_env()?;
    let items = hub.contents()?;
    let limit = hub.limit.map_or_else(String::new, |l| format!(" of at most {}", megabytes(l)));
    let total = megabytes(items.iter().map(|i| i.bytes).sum());
    println!("{}: {total}{limit}", hub.home.display());
    if items.is_empty() {
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["what", "size", "used", "name", "family", ""]);
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for item in &items {
        table.add_row([
            what(item.kind).to_owned(),
            megabytes(item.bytes),
            ago(item.used),
            item.name.clone(),
            item.family().unwrap_or_default(),
            note(item),
        ]);
        for adapter in hub.adapters_of(item, &items) {
            let on = ["  trained on it".to_owned(), String::new(), String::new(), String::new(), String::new()];
            table.add_row(on.into_iter().chain([adapter.display().to_string()]));
        }
    }
    for line in table.lines() {
        println!("{}", line.trim_end());
    }
    let stale = stale_bytes(&items);
    if items.iter().any(|i| i.stale.is_some()) {
        println!("`pocketlora remove --stale` frees {}", megabytes(stale));
    }
    Ok(())
}

fn stale_bytes(items: &[Item]) -> u64 {
    items.iter().filter(|i| i.stale.is_some()).map(|i| i.bytes).sum()
}

/// What is told of `item` among all `items`.
fn with_adapters(hub: &Hub, item: &Item, items: &[Item]) -> Value {
    let mut value = value(item);
    value["family"] = item.family().into();
    value["adapters"] = hub.adapters_of(item, items).iter().map(|path| path.display().to_string()).collect();
    value
}

pub(super) fn value(item: &Item) -> Value {
    let used = item.used.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map(|d| d.as_secs());
    json!({
        "kind": item.kind, "name": item.name, "path": item.path, "bytes": item.bytes, "used": used,
        "source": item.source, "stale": item.stale,
        "shared": item.shared.as_ref().map(|(folder, bytes)| json!({ "path": folder, "bytes": bytes })),
    })
}

pub(super) fn what(kind: Kind) -> &'static str {
    match kind {
        Kind::Model => "model",
        Kind::Adapter => "adapter",
        Kind::Quantized => "NF4 copy",
        Kind::Head => "8-bit head",
        Kind::Demo => "demo",
        Kind::History => "history",
        Kind::Leftover => "leftover",
    }
}

fn note(item: &Item) -> String {
    if let Some(why) = &item.stale {
        return format!("stale: {why}");
    }
    match (&item.shared, &item.source, item.kind) {
        (Some((folder, bytes)), ..) => format!("{} more in {}, shared", megabytes(*bytes), folder.display()),
        (_, Some(source), Kind::Quantized | Kind::Head) => format!("of {}", source.display()),
        (_, Some(source), _) => source.display().to_string(),
        _ => String::new(),
    }
}

/// How long ago `time` was, in words.
fn ago(time: Option<SystemTime>) -> String {
    let Some(seconds) = time.map(|t| t.elapsed().unwrap_or_default().as_secs()) else { return "-".to_owned() };
    match (seconds / 60, seconds / 3600, seconds / 86400) {
        (0..=1, ..) => "now".to_owned(),
        (minutes @ 2..=119, ..) => format!("{minutes} min ago"),
        (_, hours @ 2..=47, _) => format!("{hours} h ago"),
        (.., days) => format!("{days} days ago"),
    }
}
