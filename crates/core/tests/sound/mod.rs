//! Says what holds of any bytes that are read as a manifest. Properties and a fuzz target share it.

#![allow(clippy::unwrap_used)]

use sealci_core::manifest::{ManifestErrors, ManifestSource, parse};
use sealci_core::plan::Plan;

pub fn read(text: &[u8]) -> Result<Plan, ManifestErrors> {
    parse(&ManifestSource { name: "ci.yaml", text })
}

/// Whether all actions can be run, each after its needs: the slow and plain way.
pub fn can_be_run(needs: &[Vec<usize>]) -> bool {
    let mut done = vec![false; needs.len()];
    for _ in needs {
        for (action, needs) in needs.iter().enumerate() {
            done[action] = done[action] || needs.iter().all(|need| done[*need]);
        }
    }
    done.into_iter().all(|done| done)
}

pub fn assert_errors_lie_inside(errors: &ManifestErrors) {
    let text = errors.text();
    assert!(!errors.errors().is_empty());
    for error in errors.errors() {
        let (start, end) = (error.span.start, error.span.end);
        assert!(start <= end && end <= text.len(), "{error:?}");
        assert!(text.is_char_boundary(start) && text.is_char_boundary(end), "{error:?}");
        assert!(!text[start..end].contains('\n'), "{error:?}");
        assert!(error.line >= 1 && error.column >= 1 && !error.message.is_empty() && !error.mend.is_empty());
        let line_start = text[..start].rfind('\n').map_or(0, |end| end + 1);
        assert_eq!(error.line, text[..start].matches('\n').count() + 1, "{error:?}");
        assert_eq!(error.column, text[line_start..start].chars().count() + 1, "{error:?}");
    }
    assert!(errors.errors().is_sorted_by_key(|error| error.span.start));
    assert!(!errors.to_string().contains(|c: char| c.is_control() && c != '\n'), "{errors:?}");
    assert_eq!(errors.views().len(), errors.errors().len());
    let mut drawn = String::new();
    let handler = miette::GraphicalReportHandler::new_themed(miette::GraphicalTheme::none());
    handler.render_report(&mut drawn, errors.to_report().as_ref()).unwrap();
    assert!(!drawn.contains("Failed to read contents"), "{drawn}");
}

pub fn assert_sound(bytes: &[u8]) {
    match read(bytes) {
        Ok(plan) => {
            let needs: Vec<_> = plan.actions.iter().map(|action| action.needs.clone()).collect();
            assert!(can_be_run(&needs) && !plan.actions.is_empty());
            assert!(plan.actions.iter().all(|action| !action.commands.is_empty()));
        }
        Err(errors) => assert_errors_lie_inside(&errors),
    }
}
