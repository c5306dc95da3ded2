// Which torch a library was built with, to be read from the file even where it cannot be loaded (_library.py).
//
// For one source file of each library.
#pragma once

extern "C" __attribute__((used, visibility("default"))) const char headstart_built_with[] =
    "headstart: built with torch " HEADSTART_BUILT_WITH_TORCH;
