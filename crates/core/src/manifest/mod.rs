//! Turns a manifest, the YAML as written, into a [`Plan`], or into all that is wrong with it.
//!
//! ```text
//! bytes ─ source ─▶ text ─ tree ─▶ spanned tree ─ read ─▶ draft ─ graph ─▶ Plan
//!             └────────────┴───────────┴─ complaints ─┴────────────┴──────▶ ManifestErrors
//! ```
//!
//! Invariants:
//! - Text is text: a value is the string that was written. `no`, `1.10`, `0123` and `~` mean nothing else; where a
//!   key wants `true` or a duration, its own reader reads that text. A command keeps a `: ` inside it, although YAML sees
//!   a mapping there (`- echo "so: be it"`): on one line, it is taken as written.
//! - Every stage reports all it finds before the next one starts; a stage's complaints end the way only where the next
//!   stage could do nothing but guess (YAML that does not parse).
//! - Whatever the bytes are, the answer is bounded: see the limits below. Anchors and aliases are refused altogether, so
//!   nothing in a manifest can grow when it is read; what a manifest shall reuse comes with `include` and `extends`.
//! - The graph of a plan is acyclic, and its actions' names are unique.
//!
//! The parser is used directly (`granit-parser`, the one inside serde-saphyr): a derived reader ends at the first error
//! and resolves scalars to types before anyone can see what was written, and neither fits the above.

mod environment;
mod error;
mod files;
mod graph;
mod keys;
mod read;
mod reader;
mod repetition;
mod services;
mod source;
mod tree;
mod values;

use self::error::Complaints;
use self::source::Decoded;
use crate::plan::Plan;

pub use self::error::{ErrorView, ManifestError, ManifestErrorKind, ManifestErrors};
pub use self::source::{ManifestSource, Span};

/// Bytes of a manifest.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// Actions of a manifest.
pub const MAX_ACTIONS: usize = 512;
/// Commands of an action.
pub const MAX_COMMANDS: usize = 1000;
/// Bytes of a pipeline's, an action's or a label's name.
pub const MAX_NAME_BYTES: usize = 128;
/// Bytes of one value: what Linux takes as one argument or variable is not much more (`MAX_ARG_STRLEN`, 128 KiB).
pub const MAX_VALUE_BYTES: usize = 64 << 10;
/// Variables of one `env`. Together with [`MAX_ENV_BYTES`] this bounds a plan, in which every action has the pipeline's.
pub const MAX_VARIABLES: usize = 256;
/// Bytes of one `env`, names and values.
pub const MAX_ENV_BYTES: usize = 32 << 10;
/// Labels of an action.
pub const MAX_LABELS: usize = 64;
/// Entries of the other lists: paths, patterns, words.
pub const MAX_ITEMS: usize = 128;
/// Services of an action, and caches.
pub const MAX_BESIDE: usize = 16;
/// Further attempts that `retry` can wish.
pub const MAX_RETRIES: u32 = 10;
/// Bytes of a path or pattern, and of a cache's key as written.
pub const MAX_PATH_BYTES: usize = 1024;
/// Block collections, and flow collections, within one another. The language itself needs seven.
const MAX_NESTING: usize = 16;
/// Keys and values of a manifest, containers included: bounds the tree's memory.
const MAX_NODES: usize = 1 << 18;
/// Errors that are kept; further ones are counted.
const MAX_ERRORS: usize = 200;

/// Reads a manifest. Errors are all there are, in the order of the text.
pub fn parse(source: &ManifestSource<'_>) -> Result<Plan, ManifestErrors> {
    let mut complaints = Complaints::default();
    let text = match source::decode(source.text, &mut complaints) {
        Decoded::Text(text) => text,
        Decoded::Unreadable { kept } => return Err(complaints.into_errors(source.name, kept)),
    };
    let plan = plan_of(text, &mut complaints);
    match plan {
        Some(plan) if complaints.is_empty() => Ok(plan),
        _ => Err(complaints.into_errors(source.name, text)),
    }
}

/// Without a plan, or with one that is a guess, there are complaints.
fn plan_of(text: &str, complaints: &mut Complaints) -> Option<Plan> {
    let root = tree::build(text, complaints)?;
    let draft = read::pipeline(&root, text, complaints)?;
    let needs = graph::resolve(&draft.actions, complaints);
    let uses = graph::resolve_uses(&draft.actions, &needs, complaints);
    complaints.is_empty().then(|| draft.into_plan(needs, uses))
}
