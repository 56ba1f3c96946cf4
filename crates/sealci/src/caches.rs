//! The commands about caches: `cache list`, `cache delete`.

use std::num::NonZeroU32;

use clap::Args;
use jiff::Timestamp;
use sealci_api::controller::types::Cache;
use uuid::Uuid;

use crate::connect::ServerArgs;
use crate::exit::{Exit, Failure};
use crate::format;
use crate::output;
use crate::terminal::Terminal;

#[derive(Debug, Args)]
pub struct CacheListArgs {
    /// Only this repository's, by any form of its URL
    #[arg(long, value_name = "URL")]
    repository: Option<String>,
    /// At most so many
    #[arg(short, value_name = "N", default_value = "50")]
    number: NonZeroU32,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct CacheDeleteArgs {
    /// The entries' ids, as `sealci cache list` shows them
    #[arg(value_name = "ID", required = true)]
    ids: Vec<Uuid>,
    #[command(flatten)]
    server: ServerArgs,
}

/// What one page of the server's list holds at most.
const PAGE: NonZeroU32 = NonZeroU32::new(200).unwrap();

pub async fn list(args: CacheListArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let wanted = usize::try_from(args.number.get()).unwrap_or(usize::MAX);
    let mut caches: Vec<Cache> = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut request = server.client.list_caches().limit(args.number.min(PAGE));
        if let Some(repository) = &args.repository {
            request = request.repository(repository);
        }
        if let Some(cursor) = &cursor {
            request = request.cursor(cursor);
        }
        let page = match request.send().await {
            Ok(page) => page.into_inner(),
            Err(error) => return Err(server.failure(error).await),
        };
        caches.extend(page.caches);
        cursor = page.next;
        if cursor.is_none() || caches.len() >= wanted {
            break;
        }
    }
    caches.truncate(wanted);
    args.output.print(&caches, || {
        if caches.is_empty() {
            return "no cache entries\n".into();
        }
        let now = Timestamp::now();
        let rows: Vec<_> = caches.iter().map(|cache| row(cache, now)).collect();
        format::table(&["KEY", "REPOSITORY", "SEEN BY", "FILES", "PACKED", "USED", "ID"], &rows, terminal)
    })?;
    Ok(Exit::Passed)
}

fn row(cache: &Cache, now: Timestamp) -> Vec<String> {
    let seen_by = if cache.scope.is_empty() { "all".to_owned() } else { cache.scope.clone() };
    vec![
        cache.key.clone(),
        cache.repository.clone(),
        seen_by,
        cache.files.to_string(),
        format::bytes(cache.size_bytes),
        format::ago(&cache.last_used_at, now),
        cache.id.to_string(),
    ]
}

pub async fn delete(args: CacheDeleteArgs) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    for id in args.ids {
        if let Err(error) = server.client.delete_cache().cache_id(id).send().await {
            return Err(server.failure(error).await);
        }
        println!("{id}: deleted");
    }
    Ok(Exit::Passed)
}
