//! References against refcounts.

use crate::tables::{Tally, UNREADABLE};
use crate::{Kind, Report};

/// Compares both for every cluster of the file.
pub(crate) fn compare(tally: &Tally, report: &mut Report) {
    let both = tally.stored.iter().zip(&tally.references).take(tally.compared).enumerate();
    for (cluster, (&stored, &references)) in both {
        let (cluster, references) = (cluster as u64, u64::from(references));
        if stored == UNREADABLE {
            report.unchecked(Kind::RefcountUnread, cluster, references);
        } else if stored < references {
            report.corrupt(Kind::TooFewRefs, cluster, stored);
        } else if stored > references {
            report.leak(cluster, stored);
        }
    }
}
