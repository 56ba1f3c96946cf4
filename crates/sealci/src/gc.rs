//! The command `gc`: deletes now what has had its time, or says what that is.

use clap::Args;
use sealci_api::controller::types::{CollectGarbage, Garbage};

use crate::connect::ServerArgs;
use crate::exit::{Exit, Failure};
use crate::format;
use crate::output;

#[derive(Debug, Args)]
pub struct GcArgs {
    /// Delete nothing; say what would be deleted
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

pub async fn gc(args: GcArgs) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let wanted = CollectGarbage { dry_run: args.dry_run };
    let garbage = match server.client.collect_garbage().body(wanted).send().await {
        Ok(garbage) => garbage.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    args.output.print(&garbage, || words(&garbage))?;
    Ok(Exit::Passed)
}

fn words(garbage: &Garbage) -> String {
    let counted = [
        (garbage.artifacts, "artifact", "artifacts"),
        (garbage.cache_entries, "cache entry", "cache entries"),
        (garbage.logs, "log", "logs"),
        (garbage.objects, "stored object", "stored objects"),
    ];
    let parts: Vec<String> = counted
        .iter()
        .filter(|(count, ..)| *count > 0)
        .map(|(count, one, many)| format!("{count} {}", if *count == 1 { one } else { many }))
        .collect();
    let size = format::bytes(garbage.freed_bytes);
    match (parts.is_empty(), garbage.dry_run) {
        (true, true) => "nothing would be deleted\n".into(),
        (true, false) => "nothing to delete\n".into(),
        (false, true) => format!("would delete {}: {size}\n", parts.join(", ")),
        (false, false) => format!("deleted {}: {size} freed\n", parts.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_is_told() {
        let mut garbage = Garbage {
            dry_run: false,
            artifacts: 1,
            cache_entries: 0,
            logs: 2,
            blobs: 1,
            objects: 3,
            freed_bytes: 3 << 20,
        };
        assert_eq!(words(&garbage), "deleted 1 artifact, 2 logs, 3 stored objects: 3 MiB freed\n");
        garbage.dry_run = true;
        assert_eq!(words(&garbage), "would delete 1 artifact, 2 logs, 3 stored objects: 3 MiB\n");
        garbage = Garbage { artifacts: 0, logs: 0, blobs: 0, objects: 0, freed_bytes: 0, ..garbage };
        assert_eq!(words(&garbage), "nothing would be deleted\n");
    }
}
