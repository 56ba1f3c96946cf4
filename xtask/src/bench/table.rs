//! Keeps the figures and prints them: each beside its target, and beside the floor of the same run with the ratio.

use std::time::Duration;

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// At least this part of its floor.
    OfFloor(f64),
    /// At most this part of it.
    WithinFloor(f64),
}

/// The bare machine's figure, of the same run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Floor {
    pub what: &'static str,
    pub value: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub target: Option<Target>,
    pub floor: Option<Floor>,
}

impl Row {
    /// The figure over its floor's.
    fn ratio(&self) -> Option<f64> {
        self.floor.map(|floor| self.value / floor.value)
    }

    /// Whether the target is reached; none without a target.
    fn is_reached(&self) -> Option<bool> {
        Some(match self.target? {
            Target::AtMost(limit) => self.value <= limit,
            Target::AtLeast(limit) => self.value >= limit,
            Target::OfFloor(part) => self.ratio()? >= part,
            Target::WithinFloor(part) => self.ratio()? <= part,
        })
    }

    fn cells(&self) -> [String; 6] {
        let target = match self.target {
            None => String::new(),
            Some(Target::AtMost(limit)) => format!("≤ {limit:.0} {}", self.unit),
            Some(Target::AtLeast(limit)) => format!("≥ {limit:.0} {}", self.unit),
            Some(Target::OfFloor(part)) => format!("≥ {part} × floor"),
            Some(Target::WithinFloor(part)) => format!("≤ {} × floor", number(part)),
        };
        let verdict = match self.is_reached() {
            None => "",
            Some(true) => "reached",
            Some(false) => "MISSED",
        };
        [
            self.name.clone(),
            format!("{} {}", number(self.value), self.unit),
            target,
            verdict.to_owned(),
            self.floor.map_or_else(String::new, |floor| {
                format!("{} {} ({})", number(floor.value), self.unit, floor.what)
            }),
            self.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2}")),
        ]
    }
}

/// The figures of one run.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
    skipped: Vec<String>,
}

impl Table {
    pub fn push(&mut self, row: Row) {
        // So that a long run shows that it is one.
        eprintln!("  {}: {} {}", row.name, number(row.value), row.unit);
        self.rows.push(row);
    }

    pub fn skip(&mut self, name: impl std::fmt::Display, why: &str) {
        eprintln!("  SKIPPED: {name}: {why}");
        self.skipped.push(format!("SKIPPED: {name}: {why}"));
    }

    /// The table as Markdown, which a terminal shows well enough.
    pub fn show(&self) -> String {
        let head = ["", "figure", "target", "", "floor of the same run", "ratio"].map(str::to_owned);
        let rows: Vec<[String; 6]> = std::iter::once(head).chain(self.rows.iter().map(Row::cells)).collect();
        let widths: [usize; 6] = std::array::from_fn(|column| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        });
        let line = |row: &[String; 6]| {
            let cells: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!(" {cell:width$} ")).collect();
            format!("|{}|\n", cells.join("|"))
        };
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
        let mut text = rows.first().map(line).unwrap_or_default();
        text += &format!("|{}|\n", rule.join("|"));
        text.extend(rows.iter().skip(1).map(line));
        for skipped in &self.skipped {
            text += &format!("\n{skipped}\n");
        }
        text
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

pub fn median_of(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_judged_the_right_way_round() {
        let row = |target| Row {
            name: "x".into(),
            value: 50.0,
            unit: "/s",
            target: Some(target),
            floor: Some(Floor { what: "bare", value: 100.0 }),
        };
        for (target, reached) in [
            (Target::AtMost(50.0), true),
            (Target::AtMost(49.0), false),
            (Target::AtLeast(50.0), true),
            (Target::AtLeast(51.0), false),
            (Target::OfFloor(0.5), true),
            (Target::OfFloor(0.51), false),
            (Target::WithinFloor(0.5), true),
            (Target::WithinFloor(0.49), false),
        ] {
            assert_eq!(row(target).is_reached(), Some(reached), "{target:?}");
        }
        assert_eq!(Row { target: None, ..row(Target::AtMost(1.0)) }.is_reached(), None);
    }

    #[test]
    fn the_table_is_markdown_and_says_what_was_skipped() {
        let mut table = Table::default();
        table.push(Row { name: "x".into(), value: 0.5, unit: "ms", target: None, floor: None });
        table.skip("y", "it is not there");
        let text = table.show();
        assert!(text.starts_with("|   | figure  |"), "{text}");
        assert!(text.contains("\n| x | 0.50 ms |") && text.contains("SKIPPED: y: it is not there"), "{text}");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median_of(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![Duration::from_secs(5), Duration::from_secs(1)]), Duration::from_secs(5));
    }
}
