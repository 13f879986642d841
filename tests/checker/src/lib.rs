//! An independent checker of qcow2 images, written from the format's specification alone: it shares no code with the
//! engine it judges.
#![forbid(unsafe_code)]
