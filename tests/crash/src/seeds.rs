//! `crash seeds`: a plan is a recording. Plans of all kinds, each recorded twice, the two compared event for event.

use crate::args::Args;
use crate::cases::cases;
use crate::states::usage;
use crate::work::{Plan, plan};

/// Whether two recordings of a plan are the same; otherwise where they part.
fn compare(plan: &Plan) -> Result<usize, String> {
    let (a, b) = (plan.record()?, plan.record()?);
    let parted = a.events.iter().zip(&b.events).position(|(a, b)| a != b);
    if let Some(at) = parted {
        return Err(format!("event {at}: {:?}, then {:?}", a.events[at], b.events[at]));
    }
    match a == b {
        true => Ok(a.events.len()),
        false => Err(format!("{} events, then {}, or another trace", a.events.len(), b.events.len())),
    }
}

/// `crash seeds`.
pub fn seeds(args: &[String]) -> bool {
    usage(Args::parse(args, 100).map(|args| {
        let cases = cases();
        let (mut same, mut events) = (0, 0);
        for i in 0..args.count {
            let plan = plan(&cases, i, args.seed);
            match compare(&plan) {
                Ok(n) => (same, events) = (same + 1, events + n),
                Err(why) => println!("not the same twice: {plan}\n  {why}"),
            }
        }
        println!("proof: seeds replayed: {same} of {} identical; {events} events compared", args.count);
        same == args.count
    }))
}
