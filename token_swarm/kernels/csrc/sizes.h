// Sizes that several kernels and their callers agree on.
#pragma once

constexpr int MAX_EXPERTS = 64;
constexpr int SYMBOLS = 257;
constexpr int ROOM = 264;  // of a byte law: whole vectors of any width, zeros behind the last symbol
